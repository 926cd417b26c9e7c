use super::*;
use crate::testmem::Ram;
use proptest::prelude::*;

const CODE: u64 = 0x1_0000;
const DATA: u64 = 0x2_0000;
const PRIVATE: u64 = CODE + 0xff8;
const BUFFER: u64 = DATA + 0x808;

fn code() -> PhysRange {
    PhysRange::new(CODE, 0x4000).unwrap()
}

fn data() -> PhysRange {
    PhysRange::new(DATA, 0x8000).unwrap()
}

/// Firmware memory with the SMM loader's structure across a page border.
struct Firmware(Ram);

impl Firmware {
    fn new() -> Self {
        let ram = Ram::new(CODE, 0x1_8000);
        let firmware = Self(ram);
        firmware.plant(PRIVATE);
        firmware
    }

    /// The structure as typed from `PiSmmCorePrivateData.h`, by offset.
    fn plant(&self, at: u64) {
        for (offset, value) in [
            (0, u64::from(u32::from_le_bytes(*b"smmc"))),
            (8, 0x7e12_3418),
            (16, 2),
            (24, 0x7e45_0018),
            (32, 0x7ff9_0000),
            (40, 1),
            (48, 0x7ffa_0000),
            (56, 0),
            (64, 0),
            (72, 0),
            (80, 0x7ff0_0000),
            (88, 0x2_0000),
            (96, 0x7ff0_1000),
        ] {
            self.put(at + offset, &u64::to_le_bytes(value));
        }
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        assert!(self.0.write(at, bytes));
    }

    fn get(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        assert!(self.0.read(at, &mut bytes));
        u64::from_le_bytes(bytes)
    }

    /// What the runtime driver does before the OUT.
    fn send(&self, buffer: u64, bytes: &[u8]) {
        self.put(buffer, bytes);
        self.announce(buffer, bytes.len() as u64);
    }

    fn announce(&self, buffer: u64, size: u64) {
        self.put(PRIVATE + 56, &buffer.to_le_bytes());
        self.put(PRIVATE + 64, &size.to_le_bytes());
    }

    fn pending(&self) -> Result<Option<Request<'static>>> {
        CorePrivate { at: PRIVATE }.pending(&self.0, &[data()], room())
    }

    fn error(&self) -> String {
        self.pending().unwrap_err().to_string()
    }
}

/// Room for a name.
fn room() -> &'static mut Name {
    Box::leak(Box::default())
}

/// The variable handler's GUID as it lies in memory.
const VARIABLE_BYTES: [u8; 16] =
    [0x33, 0xd5, 0x32, 0xed, 0xe6, 0x99, 0x09, 0x42, 0x9c, 0xc0, 0x2d, 0x72, 0xcd, 0xd9, 0x98, 0xa7];
/// EFI_GLOBAL_VARIABLE.
const GLOBAL_BYTES: [u8; 16] =
    [0x61, 0xdf, 0xe4, 0x8b, 0xca, 0x93, 0xd2, 0x11, 0xaa, 0x0d, 0x00, 0xe0, 0x98, 0x03, 0x2b, 0x8c];

fn words(list: &[u64]) -> std::vec::Vec<u8> {
    list.iter().flat_map(|w| w.to_le_bytes()).collect()
}

fn wide(name: &str) -> std::vec::Vec<u8> {
    name.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect()
}

/// A message under the first header.
fn message(handler: &[u8; 16], payload: &[u8]) -> std::vec::Vec<u8> {
    [&handler[..], &words(&[payload.len() as u64]), payload].concat()
}

fn access(function: u64, name: &str, data: &[u8], attributes: u32) -> std::vec::Vec<u8> {
    let name = wide(name);
    let sizes = words(&[data.len() as u64, name.len() as u64]);
    [&words(&[function, 0])[..], &GLOBAL_BYTES, &sizes, &attributes.to_le_bytes(), &name, data].concat()
}

#[test]
fn the_loaders_structure_is_found_in_code_and_data() {
    for at in [CODE, PRIVATE, CODE + 0x4000 - 104, DATA + 0x10] {
        let firmware = Firmware(Ram::new(CODE, 0x1_8000));
        firmware.plant(at);
        let found = find_core_private(&firmware.0, &[code(), data()]).unwrap().unwrap();
        assert_eq!(found.address(), at);
    }
}

#[test]
fn a_signature_alone_is_not_the_structure() {
    type Change = (u64, u64);
    let changes: [Change; 8] = [
        (0, 0x1_636d_6d73),
        (8, 0),
        (16, 0),
        (16, 65),
        (24, 0),
        (40, 0),     // SMM's entry not registered
        (40, 0x101), // says that SMM is running
        (48, 0),
    ];
    for (offset, value) in changes {
        let firmware = Firmware::new();
        firmware.put(PRIVATE + offset, &value.to_le_bytes());
        assert_eq!(find_core_private(&firmware.0, &[code(), data()]), Ok(None), "{offset} {value:#x}");
    }
    let firmware = Firmware::new();
    // Cut off by the region's end; not aligned; in memory that is not the runtime's.
    let short = PhysRange::new(CODE, 0xff8 + 103).unwrap();
    assert_eq!(find_core_private(&firmware.0, &[short]), Ok(None));
    assert_eq!(find_core_private(&firmware.0, &[data()]), Ok(None));
    let unaligned = Firmware(Ram::new(CODE, 0x1_8000));
    unaligned.plant(CODE + 4);
    assert_eq!(find_core_private(&unaligned.0, &[code()]), Ok(None));
}

#[test]
fn a_second_structure_leaves_none_to_believe() {
    let firmware = Firmware::new();
    firmware.plant(DATA);
    let error = find_core_private(&firmware.0, &[code(), data()]).unwrap_err();
    assert_eq!(error, CommunicateError::Ambiguous { first: PRIVATE, second: DATA });
    let top = PhysRange::from_last(u64::MAX - 5, u64::MAX).unwrap();
    assert_eq!(find_core_private(&firmware.0, &[top]), Ok(None));
    let gone = PhysRange::new(0x100_0000, 0x1000).unwrap();
    assert!(matches!(find_core_private(&firmware.0, &[gone]), Err(CommunicateError::Unreadable { .. })));
}

/// As OVMF (202211, SMM) leaves it at its shell, in a region of runtime code; the buffer is the last one it used.
#[test]
fn a_real_firmwares_structure_and_call_are_understood() {
    let ram = Ram::new(0x1e6d_6000, 0x1000);
    let structure = words(&[
        0x636d_6d73,
        0x1d9c_4498,
        3,
        0x1d9b_8b98,
        0x1fff_8f1f,
        1,
        0x1fff_d360,
        0,
        0x69,
        0,
        0x1fff_5000,
        0xa000,
        0x1fff_be72,
    ]);
    assert!(ram.write(0x1e6d_6140, &structure));
    let region = PhysRange::new(0x1e6d_6000, 0x1000).unwrap();
    let private = find_core_private(&ram, &[region]).unwrap().unwrap();
    assert_eq!((private.address(), private.pending(&ram, &[region], room())), (0x1e6d_6140, Ok(None)));
    let payload = [
        &words(&[1, 0])[..],
        &GLOBAL_BYTES,
        &words(&[3, 0x1a]),
        &[7, 0, 0, 0],
        &wide("PlatformLang"),
        &[0; 3],
    ];
    let call = message(&VARIABLE_BYTES, &payload.concat());
    assert_eq!((call.len(), call[16]), (0x69, 0x51));
    assert!(ram.write(0x1e6d_6800, &call));
    assert!(ram.write(0x1e6d_6140 + 56, &0x1e6d_6800u64.to_le_bytes()));
    let request = private.pending(&ram, &[region], room()).unwrap().unwrap();
    assert_eq!(told(&request), "SMM GetVariable PlatformLang-8be4df61-93ca-11d2-aa0d-00e098032b8c");
}

/// What a record says of it.
fn told(request: &Request<'_>) -> String {
    let variable = request.variable().expect("a variable");
    let name = String::from_utf8(variable.name.as_bytes().to_vec()).unwrap();
    format!("{request} {name}-{}", variable.guid)
}

#[test]
fn nothing_pending_is_no_request() {
    assert_eq!(Firmware::new().pending(), Ok(None));
}

#[test]
fn calls_of_the_variable_handler_are_decoded() {
    let firmware = Firmware::new();
    firmware.send(BUFFER, &message(&VARIABLE_BYTES, &access(3, "BootOrder", &[1, 0, 2, 0], 7)));
    let request = firmware.pending().unwrap().unwrap();
    assert_eq!(request.buffer, PhysRange::new(BUFFER, 24 + 16 + 36 + 20 + 4).unwrap());
    assert_eq!((request.handler, request.length), (VARIABLE_HANDLER, 76));
    assert_eq!(told(&request), "SMM SetVariable BootOrder-8be4df61-93ca-11d2-aa0d-00e098032b8c");
    let variable = request.call.unwrap().variable.unwrap();
    assert_eq!((variable.data_size, variable.attributes), (4, 7));

    firmware.send(BUFFER, &message(&VARIABLE_BYTES, &access(1, "Böot", &[0; 64], 7)));
    let request = firmware.pending().unwrap().unwrap();
    assert_eq!(told(&request), "SMM GetVariable Böot-8be4df61-93ca-11d2-aa0d-00e098032b8c");
    assert_eq!(request.call.unwrap().variable.unwrap().attributes, 0);

    // GetNextVariableName: the size is that of the buffer, the name is shorter.
    let next =
        |name: &str| [&words(&[2, 0])[..], &GLOBAL_BYTES, &words(&[64]), &wide(name), &[0; 64]].concat();
    for (name, text) in [
        ("", "SMM GetNextVariableName -8be4df61-93ca-11d2-aa0d-00e098032b8c"),
        ("Lang", "SMM GetNextVariableName Lang-8be4df61-93ca-11d2-aa0d-00e098032b8c"),
    ] {
        firmware.send(BUFFER, &message(&VARIABLE_BYTES, &next(name)));
        assert_eq!(told(&firmware.pending().unwrap().unwrap()), text);
    }
    let property = [&words(&[9, 0])[..], &GLOBAL_BYTES, &words(&[10]), &[0xee; 24], &wide("Lang")].concat();
    firmware.send(BUFFER, &message(&VARIABLE_BYTES, &property));
    let text = told(&firmware.pending().unwrap().unwrap());
    assert_eq!(text, "SMM PropertySet Lang-8be4df61-93ca-11d2-aa0d-00e098032b8c");

    for (function, name) in [
        (4, "QueryVariableInfo"),
        (5, "ReadyToBoot"),
        (6, "ExitBootServices"),
        (7, "GetStatistics"),
        (11, "GetPayloadSize"),
        (12, "InitRuntimeCache"),
        (13, "SyncRuntimeCache"),
        (14, "GetRuntimeCacheInfo"),
    ] {
        firmware.send(BUFFER, &message(&VARIABLE_BYTES, &words(&[function, 0, 0, 0, 0, 0])));
        assert_eq!(firmware.pending().unwrap().unwrap().to_string(), format!("SMM {name}"));
    }
}

#[test]
fn the_third_header_leads_to_the_same_handler() {
    let v3 = [0x53, 0xc8, 0xe8, 0x68, 0xa9, 0x2b, 0xd7, 0x4d, 0x9a, 0xc0, 0x91, 0xe1, 0x61, 0x55, 0xc9, 0x35];
    let payload = access(1, "Lang", &[0; 8], 0);
    let total = 56 + payload.len() as u64;
    let build = |total: u64, length: u64| {
        [&v3[..], &words(&[total, 0]), &VARIABLE_BYTES, &words(&[length]), &payload].concat()
    };
    let firmware = Firmware::new();
    firmware.send(BUFFER, &build(total, payload.len() as u64));
    let request = firmware.pending().unwrap().unwrap();
    assert_eq!((request.handler, request.length), (VARIABLE_HANDLER, payload.len() as u64));
    assert!(told(&request).starts_with("SMM GetVariable Lang-"));
    firmware.send(BUFFER, &build(total + 1, payload.len() as u64));
    assert_eq!(firmware.error(), "SMM communication: buffer size in the header 0x7f, at most 0x7e");
    firmware.send(BUFFER, &build(total, payload.len() as u64 + 1));
    assert_eq!(firmware.error(), "SMM communication: message size 0x47, at most 0x46");
}

#[test]
fn other_handlers_are_named_by_guid() {
    let firmware = Firmware::new();
    firmware.send(BUFFER, &message(&GLOBAL_BYTES, &[0; 9]));
    let request = firmware.pending().unwrap().unwrap();
    assert_eq!(request.call, None);
    assert_eq!(request.to_string(), "SMM handler 8be4df61-93ca-11d2-aa0d-00e098032b8c, 9 bytes");
    let lock_box = guid!("2a3cfebd-27e8-4d0a-8b79-d688c2a3e1c0").to_bytes();
    firmware.send(BUFFER, &message(&lock_box, &[]));
    assert_eq!(firmware.pending().unwrap().unwrap().to_string(), "SMM handler \"lock box\", 0 bytes");
}

#[test]
fn buffers_elsewhere_than_in_runtime_data_are_refused() {
    let firmware = Firmware::new();
    for (at, size) in [
        (CODE, 64),               // runtime code
        (DATA - 8, 64),           // across the border
        (DATA + 0x8000 - 63, 64), // across the end
        (0x7ff0_0000, 64),        // anywhere else: SMRAM
        (u64::MAX - 10, 64),      // past the end of addresses
        (PRIVATE - 8, 64),        // over the structure that names it
    ] {
        firmware.announce(at, size);
        assert_eq!(firmware.pending(), Err(CommunicateError::Misplaced { at, size }), "{at:#x}");
    }
    let own = CorePrivate { at: PRIVATE };
    firmware.announce(PRIVATE + 96, 64);
    let everything = PhysRange::new(CODE, 0x1_8000).unwrap();
    assert!(matches!(
        own.pending(&firmware.0, &[everything], room()),
        Err(CommunicateError::Misplaced { .. })
    ));
    firmware.announce(PRIVATE + 104, 64);
    assert!(own.pending(&firmware.0, &[everything], room()).is_ok());
    firmware.announce(BUFFER, 23);
    assert_eq!(firmware.error(), "SMM communication: buffer size 0x17, at least 0x18");
    firmware.announce(BUFFER, 0x10_0001);
    assert_eq!(firmware.error(), "SMM communication: buffer size 0x100001, at most 0x100000");
}

#[test]
fn lengths_that_do_not_fit_are_refused_by_name() {
    let firmware = Firmware::new();
    let good = access(3, "Lang", &[1, 2, 3], 7);
    let sent = |change: &dyn Fn(&mut std::vec::Vec<u8>)| {
        let mut bytes = message(&VARIABLE_BYTES, &good);
        change(&mut bytes);
        firmware.send(BUFFER, &bytes);
        firmware.pending().map(|r| r.unwrap().to_string()).unwrap_or_else(|e| e.to_string())
    };
    let put = |bytes: &mut std::vec::Vec<u8>, at: usize, value: u64| {
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    };
    let prefix = |text: &str| format!("SMM communication: {text}");
    assert!(sent(&|_| ()).starts_with("SMM SetVariable"));
    assert_eq!(sent(&|b| put(b, 16, 66)), prefix("message length 0x42, at most 0x41"));
    assert_eq!(sent(&|b| put(b, 24, 15)), prefix("variable function 0xf, at most 0xe"));
    assert_eq!(sent(&|b| put(b, 24, 0)), prefix("variable function 0x0, at most 0xe"));
    assert_eq!(sent(&|b| put(b, 56, 4)), prefix("variable data size 0x4, at most 0x3"));
    assert_eq!(sent(&|b| put(b, 56, u64::MAX)), prefix("variable data size 0xffffffffffffffff, at most 0x3"));
    assert_eq!(sent(&|b| put(b, 64, 14)), prefix("message length left 0xd, at least 0xe"));
    assert_eq!(sent(&|b| put(b, 64, 2049)), prefix("name size 0x801, at most 0x800"));
    assert_eq!(sent(&|b| put(b, 64, 8)), prefix("variable name without an end"));
    assert_eq!(sent(&|b| put(b, 64, 0)), prefix("variable name without an end"));
    // A message shorter than its function needs.
    firmware.announce(BUFFER, 39);
    firmware.put(BUFFER + 16, &15u64.to_le_bytes());
    assert_eq!(firmware.error(), prefix("message length left 0xf, at least 0x10"));
}

#[test]
fn a_request_of_firmwares_own_is_told_from_the_guests() {
    let firmware = Firmware::new();
    let call = |payload: &[u8]| {
        firmware.send(BUFFER, &message(&VARIABLE_BYTES, payload));
        firmware.pending().unwrap().unwrap().call.unwrap()
    };
    let name = |text: &str| [&wide(text)[..], &[0x55; 7]].concat();
    let set = call(&access(3, "Lang", &[1], 7));
    assert!(set.answers(Service::SetVariable, &GLOBAL_BYTES, &name("Lang")));
    assert!(!set.answers(Service::GetVariable, &GLOBAL_BYTES, &name("Lang")));
    assert!(!set.answers(Service::SetTime, &GLOBAL_BYTES, &name("Lang")));
    assert!(!set.answers(Service::SetVariable, &VARIABLE_BYTES, &name("Lang")));
    for other in ["Lan", "Lang2", "", "lang"] {
        assert!(!set.answers(Service::SetVariable, &GLOBAL_BYTES, &name(other)), "{other}");
    }
    assert!(call(&access(1, "Lang", &[], 0)).answers(Service::GetVariable, &GLOBAL_BYTES, &name("Lang")));
    let first = [&words(&[2, 0])[..], &GLOBAL_BYTES, &words(&[2]), &[0; 2]].concat();
    assert!(call(&first).answers(Service::GetNextVariableName, &GLOBAL_BYTES, &[0; 2048]));
    let query = call(&words(&[4, 0, 0, 0, 0, 0]));
    assert!(query.answers(Service::QueryVariableInfo, &[0; 16], &[]));
    assert!(!query.answers(Service::GetVariable, &[0; 16], &[]));
    assert!(!call(&words(&[13, 0])).answers(Service::GetVariable, &[0; 16], &[0; 2]));
}

#[test]
fn by_default_only_variables_get_through() {
    let policy = SmmPolicy::default();
    let firmware = Firmware::new();
    let variable = {
        firmware.send(BUFFER, &message(&VARIABLE_BYTES, &access(1, "Lang", &[], 0)));
        firmware.pending()
    };
    let other = {
        firmware.send(BUFFER, &message(&GLOBAL_BYTES, &[0]));
        firmware.pending()
    };
    let refuse = |command, pending: &Result<_>, text: &str| match judge(&policy, command, pending) {
        Decision::Refuse(refusal) => assert_eq!(refusal.to_string(), text),
        Decision::Allow => panic!("{text}"),
    };
    assert_eq!(judge(&policy, 0, &variable), Decision::Allow);
    refuse(0xef, &variable, "SMI command 0xef is not allowed");
    refuse(0, &other, "SMM handler 8be4df61-93ca-11d2-aa0d-00e098032b8c is not allowed");
    refuse(0, &Ok(None), "SMI without a request");
    refuse(0, &Err(CommunicateError::Name), "SMM communication: variable name without an end");

    let both = Handlers::Only(Vec::from_iter([VARIABLE_HANDLER, Guid::from_bytes(GLOBAL_BYTES)]));
    let both = SmmPolicy { handlers: both, command: None };
    assert_eq!(judge(&both, 0xef, &other), Decision::Allow);
    let any = SmmPolicy { handlers: Handlers::Any, ..SmmPolicy::default() };
    assert_eq!(judge(&any, 0xef, &Err(CommunicateError::Name)), Decision::Allow);
    let none = SmmPolicy { handlers: Handlers::Only(Vec::new()), command: None };
    assert!(matches!(judge(&none, 0, &variable), Decision::Refuse(Refusal::Handler(_))));
}

#[test]
fn what_was_refused_is_not_pending_any_more() {
    let firmware = Firmware::new();
    firmware.send(BUFFER, &message(&GLOBAL_BYTES, &[0]));
    let private = CorePrivate { at: PRIVATE };
    assert!(private.withdraw(&firmware.0));
    assert_eq!(firmware.pending(), Ok(None));
    assert_eq!(firmware.get(PRIVATE + 72), 0x8000_0000_0000_000f);
    assert_eq!((firmware.get(PRIVATE + 64), firmware.get(PRIVATE + 80)), (25, 0x7ff0_0000));
    assert!(!CorePrivate { at: 0x10 }.withdraw(&firmware.0));
}

proptest! {
    #[test]
    fn no_message_panics_and_none_leaves_its_buffer(
        header in prop_oneof![Just(VARIABLE_BYTES), Just(HEADER_V3.to_bytes()), any::<[u8; 16]>()],
        inner in prop_oneof![Just(VARIABLE_BYTES), any::<[u8; 16]>()],
        function in prop_oneof![0u64..16, any::<u64>()],
        sizes: [u64; 4],
        small: [u8; 4],
        mask in 0u8..16,
        at in prop_oneof![DATA..DATA + 0x8000, any::<u64>()],
        size in prop_oneof![0u64..400, any::<u64>()],
        name: std::vec::Vec<u8>,
    ) {
        let firmware = Firmware::new();
        let size_of = |i: usize| if mask >> i & 1 == 0 { small[i].into() } else { sizes[i] };
        let bytes = [
            &header[..], &words(&[size_of(0)]),
            if header == HEADER_V3.to_bytes() { &[0; 8] } else { &[] },
            if header == HEADER_V3.to_bytes() { &inner[..] } else { &[] },
            &words(&[function, 0]), &GLOBAL_BYTES, &words(&[size_of(1), size_of(2)]), &[0; 4], &name,
        ].concat();
        firmware.0.write(at, &bytes);
        firmware.announce(at, size);
        if let Ok(Some(request)) = firmware.pending() {
            prop_assert!(data().contains(&request.buffer));
            prop_assert!(request.length <= request.buffer.len());
            prop_assert!(request.to_string().bytes().all(|b| matches!(b, b' '..=b'~')));
            if let Some(variable) = request.call.and_then(|c| c.variable) {
                prop_assert!(variable.data_size <= request.length);
                prop_assert!(2 * variable.name.units().count() as u64 <= request.length);
            }
        }
    }
}
