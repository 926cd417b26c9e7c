//! The gate against a model of firmware, and against firmware that lies.

use super::arguments::FIFTH_ARGUMENT;
use super::buffer::EfiTime;
use super::*;
use crate::memmap::tests::descriptor;
use crate::testmem::Ram;
use hv::io::PhysMem;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::mem::offset_of;
use uefi_raw::time::Time;

impl GuestMem for Ram {
    fn read(&self, addr: u64, out: &mut [u8]) -> bool {
        PhysMem::read(self, addr, out)
    }
    fn write(&self, addr: u64, data: &[u8]) -> bool {
        PhysMem::write(self, addr, data)
    }
}

/// Where the sandbox sees the buffer.
const SEEN_AT: u64 = 0x7000_0000;
const GUEST: u64 = 0x1_0000;
const GUEST_SIZE: usize = 0x4_0000;
const GLOBAL: [u8; 16] = [0x61; 16];

struct Own;
impl OwnVariables for Own {
    fn fill(&self, which: OwnVariable, out: &mut [u8]) -> usize {
        let text = which.name().as_bytes();
        out[..text.len()].copy_from_slice(text);
        text.len()
    }
}

type Key = (Vec<u8>, [u8; 16]);

/// Firmware with a variable store, written from the specification; it reads and writes nothing but
/// the call buffer.
#[derive(Default)]
struct Model {
    store: BTreeMap<Key, (u32, Vec<u8>)>,
    time: [u8; 16],
}

const ERR: u64 = 1 << 63;

struct View<'a>(&'a mut [u8]);
impl View<'_> {
    fn at(&mut self, addr: u64, len: usize) -> &mut [u8] {
        let start = usize::try_from(addr.checked_sub(SEEN_AT).expect("below the buffer")).unwrap();
        &mut self.0[start..start + len]
    }
    fn u64(&mut self, addr: u64) -> u64 {
        u64::from_le_bytes(self.at(addr, 8).try_into().unwrap())
    }
    fn name(&mut self, addr: u64) -> Vec<u8> {
        let mut name = Vec::new();
        for at in (addr..).step_by(2) {
            let c: [u8; 2] = self.at(at, 2).try_into().unwrap();
            if c == [0, 0] {
                return name;
            }
            name.extend(c);
        }
        unreachable!()
    }
    fn guid(&mut self, addr: u64) -> [u8; 16] {
        self.at(addr, 16).try_into().unwrap()
    }
}

impl Model {
    fn run(&mut self, call: &FirmwareCall, buffer: &mut CallBuffer) -> u64 {
        let mut v = View(buffer.as_mut_bytes());
        match call.target.service() {
            Service::GetVariable => {
                let key = (v.name(call.rcx), v.guid(call.rdx));
                let Some((attributes, data)) = self.store.get(&key) else { return ERR | 14 };
                let room = v.u64(call.r9);
                v.at(call.r9, 8).copy_from_slice(&(data.len() as u64).to_le_bytes());
                v.at(call.r8, 4).copy_from_slice(&attributes.to_le_bytes());
                if room < data.len() as u64 {
                    return ERR | 5;
                }
                if call.fifth == 0 {
                    return ERR | 2;
                }
                v.at(call.fifth, data.len()).copy_from_slice(data);
            }
            Service::SetVariable => {
                let key = (v.name(call.rcx), v.guid(call.rdx));
                if call.r9 == 0 {
                    return if self.store.remove(&key).is_some() { 0 } else { ERR | 14 };
                }
                let data = v.at(call.fifth, call.r9 as usize).to_vec();
                self.store.insert(key, (call.r8 as u32, data));
            }
            Service::GetNextVariableName => {
                let key = (v.name(call.rdx), v.guid(call.r8));
                let next = if key.0.is_empty() {
                    self.store.keys().next()
                } else {
                    self.store.range(key..).nth(1).map(|(k, _)| k)
                };
                let Some((name, guid)) = next else { return ERR | 14 };
                let (room, need) = (v.u64(call.rcx), name.len() as u64 + 2);
                v.at(call.rcx, 8).copy_from_slice(&need.to_le_bytes());
                if room < need {
                    return ERR | 5;
                }
                v.at(call.rdx, name.len()).copy_from_slice(name);
                v.at(call.rdx + name.len() as u64, 2).fill(0);
                v.at(call.r8, 16).copy_from_slice(guid);
            }
            Service::GetTime => {
                v.at(call.rcx, 16).copy_from_slice(&self.time);
                if call.rdx != 0 {
                    v.at(call.rdx, 12).copy_from_slice(&[1, 0, 0, 0, 2, 0, 0, 0, 9, 9, 9, 9]);
                }
            }
            Service::SetTime => self.time = v.at(call.rcx, 16).try_into().unwrap(),
            Service::GetWakeupTime => {
                v.at(call.rcx, 1)[0] = 7;
                v.at(call.rdx, 1)[0] = 0;
                v.at(call.r8, 16).copy_from_slice(&self.time);
            }
            Service::SetWakeupTime => assert_eq!(call.rcx == 0, call.rdx == 0),
            Service::GetNextHighMonotonicCount => v.at(call.rcx, 4).fill(0x11),
            Service::QueryVariableInfo => {
                for (to, byte) in [(call.rdx, 1), (call.r8, 2), (call.r9, 3)] {
                    v.at(to, 8).copy_from_slice(&[byte, 0, 0, 0, 0, 0, 0, 0]);
                }
            }
            other => panic!("{} never reaches firmware", other.name()),
        }
        0
    }
}

struct Bench {
    gate: Gate,
    guest: Ram,
    buffer: Box<CallBuffer>,
    model: Model,
}

fn range(start: u64, len: u64) -> PhysRange {
    PhysRange::new(start, len).unwrap()
}

impl Bench {
    fn new() -> Self {
        Self::with(&Config::default())
    }

    fn with(config: &Config) -> Self {
        Self {
            gate: Gate::new(config, range(0x20_4000, 0x1000), range(0x20_0000, 0x3000)),
            guest: Ram::new(GUEST, GUEST_SIZE),
            buffer: Box::new(CallBuffer::new_zeroed()),
            model: Model::default(),
        }
    }

    fn put(&self, at: u64, data: &[u8]) {
        assert!(GuestMem::write(&self.guest, at, data));
    }

    fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        assert!(GuestMem::read(&self.guest, at, &mut out));
        out
    }

    fn begin(&mut self, service: Service, a: [u64; 5]) -> Begin {
        let rsp = GUEST + GUEST_SIZE as u64 - 0x100;
        self.put(rsp + 0x28, &a[4].to_le_bytes());
        let args = Args { rcx: a[0], rdx: a[1], r8: a[2], r9: a[3], rsp };
        self.gate.begin(service, &args, &self.guest, &Own, &mut self.buffer)
    }

    /// A call with well-behaved firmware.
    fn call(&mut self, service: Service, a: [u64; 5]) -> Status {
        match self.begin(service, a) {
            Begin::Done(answer) => answer.status,
            Begin::Run(pending) => {
                let rax = self.model.run(&pending.call(SEEN_AT), &mut self.buffer);
                let outcome = self.gate.end(pending, rax, &self.guest, &mut self.buffer);
                assert_eq!(outcome.anomaly, None);
                outcome.status
            }
            other => panic!("{other:?}"),
        }
    }

    /// A call whose firmware does `act` to the buffer and returns `rax`.
    fn hostile(&mut self, service: Service, a: [u64; 5], rax: u64, act: impl Fn(&mut CallBuffer)) -> Outcome {
        let Begin::Run(pending) = self.begin(service, a) else { panic!("not run") };
        act(&mut self.buffer);
        self.gate.end(pending, rax, &self.guest, &mut self.buffer)
    }

    fn put_name(&self, at: u64, name: &str) {
        let wide: Vec<u8> = name.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect();
        self.put(at, &wide);
    }

    fn name_at(&self, at: u64, bytes: u64) -> String {
        let raw = self.get(at, bytes as usize - 2);
        String::from_utf16(&raw.chunks(2).map(|c| u16::from_le_bytes([c[0], c[1]])).collect::<Vec<_>>())
            .unwrap()
    }

    fn u64_at(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.get(at, 8).try_into().unwrap())
    }
}

const NAME: u64 = GUEST;
const VENDOR_AT: u64 = GUEST + 0x1000;
const SIZE: u64 = GUEST + 0x1100;
const ATTR: u64 = GUEST + 0x1200;
const DATA: u64 = GUEST + 0x2000;
const TIME: u64 = GUEST + 0x1300;
const NOON: [u8; 16] = [0xe8, 7, 2, 29, 12, 30, 59, 0xaa, 0, 0, 0, 0, 0xff, 7, 0xff, 0xaa];

fn variable_args() -> [u64; 5] {
    [NAME, VENDOR_AT, ATTR, SIZE, DATA]
}

fn ready(b: &Bench, name: &str, room: u64) {
    b.put_name(NAME, name);
    b.put(VENDOR_AT, &GLOBAL);
    b.put(SIZE, &room.to_le_bytes());
}

#[test]
fn the_buffer_is_laid_out_in_whole_pages() {
    assert_eq!(offset_of!(CallBuffer, name), 2048);
    assert_eq!(offset_of!(CallBuffer, data), 4096);
    assert_eq!(CALL_BUFFER_SIZE, 17 * 4096);
    assert_eq!(size_of::<EfiTime>(), size_of::<Time>());
    assert_eq!(offset_of!(EfiTime, daylight), offset_of!(Time, daylight));
    let frame =
        FirmwareCall { target: Target::Service(Service::GetTime), rcx: 0, rdx: 0, r8: 0, r9: 0, fifth: 9 }
            .frame(8);
    assert_eq!((frame[0], frame[FIFTH_ARGUMENT as usize / 8]), (8, 9));
}

#[test]
fn a_variable_is_written_read_and_deleted() {
    let mut b = Bench::new();
    ready(&b, "Boot0001", 0);
    b.put(DATA, b"hello");
    assert_eq!(b.call(Service::SetVariable, [NAME, VENDOR_AT, 7, 5, DATA]), Status::SUCCESS);
    b.put(DATA, &[0xee; 8]);
    assert_eq!(b.call(Service::GetVariable, variable_args()), Status::BUFFER_TOO_SMALL);
    assert_eq!((b.u64_at(SIZE), b.get(ATTR, 4)), (5, vec![7, 0, 0, 0]));
    assert_eq!(b.get(DATA, 8), [0xee; 8]);
    assert_eq!(b.call(Service::GetVariable, variable_args()), Status::SUCCESS);
    assert_eq!(b.get(DATA, 8), b"hello\xee\xee\xee");
    // Attributes are optional.
    assert_eq!(b.call(Service::GetVariable, [NAME, VENDOR_AT, 0, SIZE, DATA]), Status::SUCCESS);
    assert_eq!(b.call(Service::SetVariable, [NAME, VENDOR_AT, 7, 0, 0]), Status::SUCCESS);
    assert_eq!(b.call(Service::GetVariable, variable_args()), Status::NOT_FOUND);
}

#[test]
fn sizes_up_to_the_limit_work_and_no_more() {
    let mut b = Bench::new();
    ready(&b, "Big", u64::MAX);
    let big = vec![0x5a; DATA_MAX];
    b.put(DATA, &big);
    let max = DATA_MAX as u64;
    assert_eq!(b.call(Service::SetVariable, [NAME, VENDOR_AT, 7, max, DATA]), Status::SUCCESS);
    for too_big in [max + 1, 1 << 32, u64::MAX] {
        let args = [NAME, VENDOR_AT, 7, too_big, DATA];
        assert_eq!(b.call(Service::SetVariable, args), Status::INVALID_PARAMETER);
    }
    assert_eq!(b.call(Service::GetVariable, variable_args()), Status::SUCCESS);
    assert_eq!(b.u64_at(SIZE), max);
    // A name that ends with the limit, then one character more.
    b.put_name(NAME, &"n".repeat(NAME_MAX / 2 - 1));
    assert_eq!(b.call(Service::GetVariable, variable_args()), Status::NOT_FOUND);
    b.put_name(NAME, &"n".repeat(NAME_MAX / 2));
    assert_eq!(b.call(Service::GetVariable, variable_args()), Status::INVALID_PARAMETER);
}

#[test]
fn pointers_the_specification_wants_may_not_be_null_nor_bad() {
    use Service as S;
    let good: [(S, [u64; 5], &[usize]); 8] = [
        (S::GetVariable, variable_args(), &[0, 1, 3]),
        (S::SetVariable, [NAME, VENDOR_AT, 7, 4, DATA], &[0, 1, 4]),
        (S::GetNextVariableName, [SIZE, NAME, VENDOR_AT, 0, 0], &[0, 1, 2]),
        (S::QueryVariableInfo, [7, DATA, DATA + 8, DATA + 16, 0], &[1, 2, 3]),
        (S::GetTime, [TIME, ATTR, 0, 0, 0], &[0]),
        (S::SetTime, [TIME, 0, 0, 0, 0], &[0]),
        (S::GetWakeupTime, [DATA, DATA + 1, TIME, 0, 0], &[0, 1, 2]),
        (S::SetWakeupTime, [1, TIME, 0, 0, 0], &[1]),
    ];
    for (service, args, needed) in good {
        for i in needed {
            for bad in [0, GUEST - 4, 0xdead_0000, u64::MAX, u64::MAX - 3] {
                let mut b = Bench::new();
                ready(&b, "", 64);
                b.put(TIME, &NOON);
                b.model.time = NOON;
                b.model.store.insert((b"V\0".to_vec(), GLOBAL), (7, vec![1; 4]));
                if service == S::GetVariable {
                    b.put_name(NAME, "V");
                }
                assert_eq!(b.call(service, args), Status::SUCCESS, "{}", service.name());
                ready(&b, if service == S::GetVariable { "V" } else { "" }, 64);
                let mut broken = args;
                broken[*i] = bad;
                let status = b.call(service, broken);
                assert_eq!(status, Status::INVALID_PARAMETER, "{} {i} {bad:#x}", service.name());
            }
        }
    }
    let mut b = Bench::new();
    assert_eq!(b.call(S::GetNextHighMonotonicCount, [0; 5]), Status::INVALID_PARAMETER);
    assert_eq!(b.call(S::GetNextHighMonotonicCount, [DATA, 0, 0, 0, 0]), Status::SUCCESS);
    assert_eq!(b.get(DATA, 5), [0x11, 0x11, 0x11, 0x11, 0]);
    assert_eq!(b.call(S::SetWakeupTime, [0x100, 0, 0, 0, 0]), Status::SUCCESS);
}

#[test]
fn a_name_is_not_read_past_the_page_that_holds_its_end() {
    let mut b = Bench::new();
    ready(&b, "", 64);
    // The last bytes of guest memory; the name starts at an odd address, too.
    let end = GUEST + GUEST_SIZE as u64;
    for at in [end - 4, end - 5] {
        b.put_name(at, "x");
        assert_eq!(b.call(Service::GetVariable, [at, VENDOR_AT, 0, SIZE, DATA]), Status::NOT_FOUND);
    }
    b.put(end - 4, &[b'x', 0, b'y', 0]);
    let status = b.call(Service::GetVariable, [end - 4, VENDOR_AT, 0, SIZE, DATA]);
    assert_eq!(status, Status::INVALID_PARAMETER);
}

#[test]
fn names_are_listed_cordons_first_then_firmwares() {
    let mut b = Bench::new();
    for name in ["a", "b", "c"] {
        let wide: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
        b.model.store.insert((wide, GLOBAL), (7, vec![1]));
    }
    ready(&b, "", 1024);
    let mut seen = Vec::new();
    loop {
        b.put(SIZE, &1024u64.to_le_bytes());
        match b.call(Service::GetNextVariableName, [SIZE, NAME, VENDOR_AT, 0, 0]) {
            Status::SUCCESS => seen.push(b.name_at(NAME, b.u64_at(SIZE))),
            status => {
                assert_eq!(status, Status::NOT_FOUND);
                break;
            }
        }
    }
    assert_eq!(seen, ["DrtmLog", "Status", "Exits", "Exposure", "a", "b", "c"]);
}

#[test]
fn cordons_variables_are_readable_and_read_only() {
    let mut b = Bench::new();
    ready(&b, "Status", 3);
    b.put(VENDOR_AT, &VENDOR.to_bytes());
    assert_eq!(b.call(Service::GetVariable, variable_args()), Status::BUFFER_TOO_SMALL);
    assert_eq!(b.u64_at(SIZE), 6);
    assert_eq!(b.call(Service::GetVariable, variable_args()), Status::SUCCESS);
    assert_eq!((b.get(DATA, 6), b.get(ATTR, 4)), (b"Status".to_vec(), vec![6, 0, 0, 0]));
    for size in [0, 4, u64::MAX] {
        let args = [NAME, VENDOR_AT, 7, size, DATA];
        assert_eq!(b.call(Service::SetVariable, args), Status::WRITE_PROTECTED);
    }
    b.put_name(NAME, "Statu");
    assert_eq!(b.call(Service::GetVariable, variable_args()), Status::NOT_FOUND);
    let next = [SIZE, NAME, VENDOR_AT, 0, 0];
    b.put(SIZE, &64u64.to_le_bytes());
    assert_eq!(b.call(Service::GetNextVariableName, next), Status::INVALID_PARAMETER);
    b.put_name(NAME, "Status");
    b.put(SIZE, &14u64.to_le_bytes());
    assert_eq!(b.call(Service::GetNextVariableName, next), Status::SUCCESS);
    assert_eq!(b.name_at(NAME, 12), "Exits");
    b.put_name(NAME, "");
    b.put(VENDOR_AT, &GLOBAL);
    assert_eq!(b.call(Service::GetNextVariableName, next), Status::BUFFER_TOO_SMALL);
    assert_eq!(b.u64_at(SIZE), 16);
}

#[test]
fn denied_and_missing_services_are_unsupported() {
    let config = Config::parse(b"service.GetTime = deny").unwrap();
    let mut b = Bench::with(&config);
    b.put(TIME, &NOON);
    assert_eq!(b.call(Service::GetTime, [TIME, 0, 0, 0, 0]), Status::UNSUPPORTED);
    assert_eq!(b.call(Service::SetTime, [TIME, 0, 0, 0, 0]), Status::SUCCESS);
    assert_eq!(b.call(Service::ConvertPointer, [NAME, 1, DATA, DATA, 0]), Status::UNSUPPORTED);
}

#[test]
fn a_locked_service_opens_only_after_an_unlock() {
    let config = Config::parse(b"service.SetTime = locked\nservice.SetVariable = locked").unwrap();
    let mut b = Bench::with(&config);
    b.put(TIME, &NOON);
    let refused = Begin::Done(Answer { status: Status::SECURITY_VIOLATION, decision: Decision::LOCKED });
    assert_eq!(b.begin(Service::SetTime, [TIME, 0, 0, 0, 0]), refused);
    let unlock = |b: &mut Bench, text: &[u8]| {
        b.put_name(NAME, "Unlock");
        b.put(VENDOR_AT, &VENDOR.to_bytes());
        b.put(DATA, text);
        b.begin(Service::SetVariable, [NAME, VENDOR_AT, 6, text.len() as u64, DATA])
    };
    let answer = Begin::Done(Answer { status: Status::INVALID_PARAMETER, decision: Decision::OWN });
    assert_eq!(unlock(&mut b, b"Everything"), answer);
    assert_eq!(unlock(&mut b, b""), answer);
    let Begin::Unlock(services) = unlock(&mut b, b"SetTime\n") else { panic!("not unlocked") };
    assert_eq!(services.to_string(), "SetTime");
    // It is the caller that opens it, once a PCR shows it.
    assert_eq!(b.begin(Service::SetTime, [TIME, 0, 0, 0, 0]), refused);
    b.gate.unlock(services);
    assert_eq!(b.call(Service::SetTime, [TIME, 0, 0, 0, 0]), Status::SUCCESS);
    ready(&b, "A", 0);
    assert_eq!(b.begin(Service::SetVariable, [NAME, VENDOR_AT, 7, 5, DATA]), refused);
    let Begin::Unlock(all) = unlock(&mut b, b"all") else { panic!("not unlocked") };
    assert!(Service::ALL.into_iter().all(|s| all.contains(s)));
    b.gate.unlock(all);
    ready(&b, "A", 0);
    assert_eq!(b.call(Service::SetVariable, [NAME, VENDOR_AT, 7, 5, DATA]), Status::SUCCESS);
}

#[test]
fn single_variables_have_policies_of_their_own() {
    let text = b"service.SetVariable.*:Boot* = deny\nservice.GetVariable.*:Boot0002 = locked";
    let mut b = Bench::with(&Config::parse(text).unwrap());
    ready(&b, "Boot0001", 64);
    let denied = Begin::Done(Answer { status: Status::SECURITY_VIOLATION, decision: Decision::DENIED });
    assert_eq!(b.begin(Service::SetVariable, [NAME, VENDOR_AT, 7, 5, DATA]), denied);
    assert_eq!(b.call(Service::GetVariable, variable_args()), Status::NOT_FOUND);
    ready(&b, "Boot0002", 64);
    let locked = Begin::Done(Answer { status: Status::SECURITY_VIOLATION, decision: Decision::LOCKED });
    assert_eq!(b.begin(Service::GetVariable, variable_args()), locked);
    ready(&b, "Other", 64);
    assert_eq!(b.call(Service::SetVariable, [NAME, VENDOR_AT, 7, 5, DATA]), Status::SUCCESS);
    // No service of Cordon's own variables depends on a rule.
    b.put_name(NAME, "Status");
    b.put(VENDOR_AT, &VENDOR.to_bytes());
    assert_eq!(b.call(Service::GetVariable, variable_args()), Status::SUCCESS);
}

#[test]
fn what_waits_is_answered_as_firmware_would() {
    use crate::deferred::{Base, Key, Overlay, Wanted};
    let mut b = Bench::with(&Config::parse(b"service.SetVariable = deferred").unwrap());
    let mut overlay = Box::new(Overlay::new_zeroed());
    ready(&b, "Boot0001", 0);
    b.put(DATA, b"hello");
    let Begin::Defer(write) = b.begin(Service::SetVariable, [NAME, VENDOR_AT, 7, 5, DATA]) else { panic!() };
    // What firmware has is asked with the guest's own question in its place.
    let mut asked = Box::new(CallBuffer::new_zeroed());
    asked.as_mut_bytes().copy_from_slice(b.buffer.as_bytes());
    let lookup = Pending::lookup(&mut asked);
    let rax = b.model.run(&lookup.call(SEEN_AT), &mut asked);
    assert_eq!(Pending::base(rax, &asked), Ok(Base::Absent));
    let (attributes, data) = write.write(&b.buffer).unwrap();
    let status = overlay.set(b.buffer.key().unwrap(), attributes, data, Base::Absent);
    assert_eq!(status, Status::SUCCESS);
    // The guest reads it, with too small a buffer first.
    for (room, status) in [(4, Status::BUFFER_TOO_SMALL), (8, Status::SUCCESS)] {
        ready(&b, "Boot0001", room);
        let Begin::Run(read) = b.begin(Service::GetVariable, variable_args()) else { panic!() };
        let wanted = overlay.get(b.buffer.key().unwrap()).unwrap();
        let rax = read.answer_variable(wanted, &mut b.buffer);
        assert_eq!(b.gate.end(read, rax, &b.guest, &mut b.buffer).status, status);
        assert_eq!(b.u64_at(SIZE), 5);
    }
    assert_eq!((b.get(DATA, 5), b.get(ATTR, 4)), (b"hello".to_vec(), vec![7, 0, 0, 0]));
    // It is listed, if its name fits.
    for (room, status) in [(4, Status::BUFFER_TOO_SMALL), (64, Status::SUCCESS)] {
        ready(&b, "x", room);
        let Begin::Run(next) = b.begin(Service::GetNextVariableName, [SIZE, NAME, VENDOR_AT, 0, 0]) else {
            panic!()
        };
        let first = overlay.next_new(None).unwrap();
        let rax = next.answer_name(first, &mut b.buffer);
        assert_eq!(b.gate.end(next, rax, &b.guest, &mut b.buffer).status, status);
    }
    assert_eq!(b.name_at(NAME, 18), "Boot0001");
    // At the end firmware gets it.
    let (key, wanted) = overlay.at(0).unwrap();
    assert_eq!(wanted, Wanted::Content(b"hello"));
    let commit = Pending::commit(key, wanted, &mut b.buffer);
    assert_eq!(b.model.run(&commit.call(SEEN_AT), &mut b.buffer), 0);
    let name: Vec<u8> = "Boot0001".encode_utf16().flat_map(u16::to_le_bytes).collect();
    assert_eq!(b.model.store[&(name, GLOBAL)], (7, b"hello".to_vec()));
    assert_eq!(Key::new((&GLOBAL, &[1])), None);
}

#[test]
fn times_are_checked_in_both_directions() {
    let mut b = Bench::new();
    b.put(TIME, &NOON);
    assert_eq!(b.call(Service::SetTime, [TIME, 0, 0, 0, 0]), Status::SUCCESS);
    let mut clean = NOON;
    (clean[7], clean[14], clean[15]) = (0, 3, 0);
    assert_eq!(b.model.time, clean, "unused bits do not reach firmware");
    assert_eq!(b.call(Service::GetTime, [TIME, ATTR, 0, 0, 0]), Status::SUCCESS);
    assert_eq!(b.get(ATTR, 12), [1, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(b.call(Service::GetWakeupTime, [DATA, DATA + 1, TIME, 0, 0]), Status::SUCCESS);
    assert_eq!(b.get(DATA, 2), [1, 0]);
    let mut month = NOON;
    month[2] = 13;
    b.put(TIME, &month);
    assert_eq!(b.call(Service::SetTime, [TIME, 0, 0, 0, 0]), Status::INVALID_PARAMETER);
    assert_eq!(b.call(Service::SetWakeupTime, [1, TIME, 0, 0, 0]), Status::INVALID_PARAMETER);
    assert_eq!(b.call(Service::SetWakeupTime, [0, TIME, 0, 0, 0]), Status::SUCCESS);
    let outcome = b.hostile(Service::GetTime, [TIME, 0, 0, 0, 0], 0, |buffer| {
        buffer.slots.time.as_mut_bytes().copy_from_slice(&month);
    });
    assert_eq!(outcome, Outcome { status: Status::DEVICE_ERROR, anomaly: Some(Anomaly::Time) });
}

#[test]
fn what_firmware_says_is_checked() {
    let refused = |anomaly| Outcome { status: Status::DEVICE_ERROR, anomaly: Some(anomaly) };
    let mut b = Bench::new();
    ready(&b, "x", 16);
    let size = |said| move |buffer: &mut CallBuffer| buffer.slots.size = said;
    for said in [17, DATA_MAX as u64, u64::MAX] {
        let outcome = b.hostile(Service::GetVariable, variable_args(), 0, size(said));
        assert_eq!(outcome, refused(Anomaly::Size { said, buffer: 16 }));
    }
    for said in [0, 16, DATA_MAX as u64 + 1, u64::MAX] {
        let outcome = b.hostile(Service::GetVariable, variable_args(), ERR | 5, size(said));
        assert_eq!(outcome, refused(Anomaly::Size { said, buffer: 16 }));
    }
    assert_eq!(b.u64_at(SIZE), 16, "nothing reached the guest");
    for raw in [1, 5, 0x8000_0000_0000_0024, ERR, 0xffff_ffff_ffff_ffff, 0xc000_0000_0000_0005] {
        let outcome = b.hostile(
            Service::SetTime,
            {
                b.put(TIME, &NOON);
                [TIME, 0, 0, 0, 0]
            },
            raw,
            |_| {},
        );
        assert_eq!(outcome, refused(Anomaly::Status(raw)));
    }
    let next = [SIZE, NAME, VENDOR_AT, 0, 0];
    let outcome = b.hostile(Service::GetNextVariableName, next, 0, |buffer| buffer.name = [1; NAME_MAX]);
    assert_eq!(outcome, refused(Anomaly::Name));
    let outcome = b.hostile(Service::GetNextVariableName, next, 0, size(17));
    assert_eq!(outcome, refused(Anomaly::Size { said: 17, buffer: 16 }));
    for said in [16, NAME_MAX as u64 + 1] {
        let outcome = b.hostile(Service::GetNextVariableName, next, ERR | 5, size(said));
        assert_eq!(outcome, refused(Anomaly::Size { said, buffer: 16 }));
    }
    let outcome = b.hostile(Service::GetNextVariableName, next, 0, |buffer| {
        buffer.slots.guid = VENDOR.to_bytes();
    });
    assert_eq!(outcome, Outcome { status: Status::DEVICE_ERROR, anomaly: Some(Anomaly::OwnGuid) });
}

#[test]
fn firmware_cannot_hand_out_what_an_earlier_call_left() {
    let mut b = Bench::new();
    ready(&b, "x", 16);
    b.put(DATA, b"secret of another");
    assert_eq!(b.call(Service::SetVariable, [NAME, VENDOR_AT, 7, 17, DATA]), Status::SUCCESS);
    let outcome = b.hostile(Service::GetVariable, variable_args(), 0, |_| {});
    assert_eq!(outcome.status, Status::SUCCESS);
    assert_eq!(b.get(DATA, 16), [0; 16]);
}

#[test]
fn older_firmware_may_leave_the_attributes_alone() {
    let mut b = Bench::new();
    ready(&b, "x", 4);
    b.put(ATTR, &[9, 8, 7, 6]);
    let outcome = b.hostile(Service::GetVariable, variable_args(), ERR | 5, |buffer| buffer.slots.size = 5);
    assert_eq!(outcome, Outcome::of(Status::BUFFER_TOO_SMALL));
    assert_eq!((b.get(ATTR, 4), b.u64_at(SIZE)), (vec![9, 8, 7, 6], 5));
}

#[test]
fn resets_are_decoded() {
    let mut b = Bench::new();
    for (raw, kind) in [(0, ResetKind::Cold), (1, ResetKind::Warm), (2, ResetKind::Shutdown)] {
        assert_eq!(b.begin(Service::ResetSystem, [raw, 0, 0, 0, 0]), Begin::Reset(kind));
    }
    assert_eq!(b.begin(Service::ResetSystem, [3, 0, 4, DATA, 0]), Begin::Reset(ResetKind::Platform));
    let done = Begin::Done(Answer { status: Status::INVALID_PARAMETER, decision: Decision::OWN });
    assert_eq!(b.begin(Service::ResetSystem, [4, 0, 0, 0, 0]), done);
}

#[test]
fn the_virtual_address_map_is_taken_once_and_must_hold_our_regions() {
    let mut b = Bench::new();
    let map = |list: &[Descriptor]| list.as_bytes().to_vec();
    let tables = descriptor(6, 0x20_0000, 3, 1 << 63);
    let thunks = descriptor(5, 0x20_4000, 1, 1 << 63);
    let svam = Service::SetVirtualAddressMap;
    b.put(DATA, &map(&[tables]));
    assert_eq!(b.call(svam, [40, 40, 1, DATA, 0]), Status::NO_MAPPING);
    b.put(DATA, &map(&[descriptor(6, 0x20_0000, 2, 0), thunks]));
    assert_eq!(b.call(svam, [80, 40, 1, DATA, 0]), Status::NO_MAPPING);
    b.put(DATA, &map(&[descriptor(6, 0x20_0000, u64::MAX, 0), thunks]));
    assert_eq!(b.call(svam, [80, 40, 1, DATA, 0]), Status::INVALID_PARAMETER);
    b.put(DATA, &map(&[thunks, tables]));
    for bad in [
        [80, 40, 2, DATA, 0],
        [80, 0, 1, DATA, 0],
        [80, 39, 1, DATA, 0],
        [81, 40, 1, DATA, 0],
        [u64::MAX - u64::MAX % 40, 40, 1, DATA, 0],
        [80, 40, 1, 0, 0],
        [80, 40, 1, 0xdead_0000, 0],
    ] {
        assert_eq!(b.call(svam, bad), Status::INVALID_PARAMETER, "{bad:x?}");
    }
    assert_eq!(b.call(svam, [80, 40, 1, DATA, 0]), Status::SUCCESS);
    assert_eq!(b.call(svam, [80, 40, 1, DATA, 0]), Status::UNSUPPORTED);
}

fn any_pointer() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(0),
        GUEST..GUEST + GUEST_SIZE as u64,
        GUEST + GUEST_SIZE as u64 - 64..GUEST + GUEST_SIZE as u64 + 8,
        any::<u64>(),
        0u64..0x2_0000,
    ]
}

#[test]
fn where_firmware_runs_is_the_policys_by_variable() {
    let rule = "service.SetVariable.*:a* = native\nservice.GetTime = native";
    let mut b = Bench::with(&Config::parse(rule.as_bytes()).unwrap());
    for (name, place) in [("ab", Place::Native), ("ba", Place::Sandbox)] {
        ready(&b, name, 8);
        for (service, place) in [(Service::SetVariable, place), (Service::GetVariable, Place::Sandbox)] {
            let args =
                if service == Service::SetVariable { [NAME, VENDOR_AT, 7, 1, DATA] } else { variable_args() };
            assert!(matches!(b.begin(service, args), Begin::Run(_)));
            assert_eq!(b.gate.place(service, &b.buffer), place, "{service:?} {name}");
        }
    }
    assert_eq!(b.gate.place(Service::GetTime, &b.buffer), Place::Native);
}

#[test]
fn handlers_are_told_apart_by_their_guids() {
    let [good, bad] = [7u8, 8].map(|n| Guid::from_bytes([n; 16]));
    let file = format!("service.PrmHandler.{bad} = deny\nservice.PrmHandler = locked");
    let mut b = Bench::with(&Config::parse(file.as_bytes()).unwrap());
    let refused = |decision| Begin::Done(Answer { status: Status::SECURITY_VIOLATION, decision });
    assert_eq!(b.gate.begin_handler(3, good, &mut b.buffer), refused(Decision::LOCKED));
    b.gate.unlock(Services::named(b"PrmHandler").unwrap());
    assert_eq!(b.gate.begin_handler(3, good, &mut b.buffer), Begin::Handler(3));
    assert_eq!(b.buffer.variable(Service::PrmHandler).unwrap().0, &[7; 16]);
    assert_eq!(b.gate.begin_handler(3, bad, &mut b.buffer), refused(Decision::DENIED));
    let native = format!("service.PrmHandler.{bad} = native");
    let mut b = Bench::with(&Config::parse(native.as_bytes()).unwrap());
    for (guid, place) in [(bad, Place::Native), (good, Place::Sandbox)] {
        assert_eq!(b.gate.begin_handler(3, guid, &mut b.buffer), Begin::Handler(3));
        assert_eq!(b.gate.place(Service::PrmHandler, &b.buffer), place);
    }
    assert_eq!(b.call(Service::PrmHandler, [0; 5]), Status::UNSUPPORTED);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]
    #[test]
    fn no_guest_and_no_firmware_panics_the_gate_or_reaches_past_its_buffer(
        service in 0usize..14,
        args in proptest::array::uniform5(any_pointer()),
        fill in any::<u8>(),
        head in proptest::collection::vec(any::<u8>(), 96),
        rax in prop_oneof![Just(0u64), Just(ERR | 5), Just(ERR | 14), any::<u64>()],
    ) {
        let mut b = Bench::new();
        b.put(GUEST, &vec![fill; GUEST_SIZE / 2]);
        let before = b.get(GUEST, GUEST_SIZE - 0x200);
        match b.begin(Service::ALL[service], args) {
            Begin::Run(pending) => {
                prop_assert_eq!(
                    &b.get(GUEST, GUEST_SIZE - 0x200), &before,
                    "nothing is written before firmware has run"
                );
                let call = pending.call(SEEN_AT);
                let results = pending.results;
                b.buffer.as_mut_bytes()[..96].copy_from_slice(&head);
                b.buffer.data.fill(0xa5);
                let outcome = b.gate.end(pending, rax, &b.guest, &mut b.buffer);
                prop_assert_eq!(call.target, Target::Service(Service::ALL[service]));
                // Data is written only inside the buffer that the guest named.
                if let Results::Variable { data, size, .. } = results {
                    let after = b.get(GUEST, GUEST_SIZE - 0x200);
                    let written = before.iter().zip(&after).enumerate();
                    for (at, _) in written.filter(|(_, (x, y))| x != y && **y == 0xa5) {
                        let at = GUEST + at as u64;
                        let small = [args[2], args[3]].iter().any(|p| at.wrapping_sub(*p) < 8);
                        prop_assert!(small || at.wrapping_sub(data) < size as u64);
                    }
                }
                prop_assert!(outcome.status.is_success() || outcome.status.is_error());
            }
            Begin::Done(answer) => prop_assert!(!answer.status.is_warning()),
            Begin::Reset(_) | Begin::Unlock(_) | Begin::Capsules | Begin::Defer(_) | Begin::Handler(_) => {}
        }
    }

    #[test]
    fn calls_through_the_gate_do_what_calls_of_the_firmware_do(
        steps in proptest::collection::vec(
            (any::<bool>(), "[ab]{1,2}", proptest::collection::vec(any::<u8>(), 0..40), 0u64..48), 1..24)
    ) {
        let mut b = Bench::new();
        let mut reference = BTreeMap::<String, Vec<u8>>::new();
        for (write, name, data, room) in steps {
            ready(&b, &name, room);
            if write {
                b.put(DATA, &data);
                let status = b.call(Service::SetVariable, [NAME, VENDOR_AT, 7, data.len() as u64, DATA]);
                let existed = if data.is_empty() {
                    reference.remove(&name).is_some()
                } else {
                    reference.insert(name, data);
                    true
                };
                prop_assert_eq!(status == Status::SUCCESS, existed);
            } else {
                let status = b.call(Service::GetVariable, variable_args());
                match reference.get(&name) {
                    None => prop_assert_eq!(status, Status::NOT_FOUND),
                    Some(data) => {
                        prop_assert_eq!(b.u64_at(SIZE), data.len() as u64);
                        if data.len() as u64 <= room {
                            prop_assert_eq!(status, Status::SUCCESS);
                            prop_assert_eq!(&b.get(DATA, data.len()), data);
                        } else {
                            prop_assert_eq!(status, Status::BUFFER_TOO_SMALL);
                        }
                    }
                }
            }
        }
    }
}
