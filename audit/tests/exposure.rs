//! The tool on exposure logs that the MLE's own code wrote, as in a guest: folders stand for efivarfs and for the TPM in sysfs.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    reason = "helpers of tests stop their test by a panic"
)]

mod common;

use std::path::Path;
use std::process::Command;

use common::{Folder, cordon};
use firmware::exposure::{
    Access, Decision, Denied, ExposureLog, Guid, Kind, Name, Record, Region, Text, Variable,
};
use firmware::service::Service;
use tpm::log::extended_all;
use tpm::{Bank, BankHasher, Banks, Digests, HashAlg, LogWriter};

const GUID: &str = "a720b6bf-f9e9-4210-b163-30211c7ddf1f";
/// What an evil firmware would call a variable.
const EVIL: &str = "</title><script>alert('x')</script>\u{1b}[2J\u{202e}";

fn banks() -> Banks {
    [HashAlg::SHA1, HashAlg::SHA256].map(|alg| Bank::computed(alg).unwrap()).into_iter().collect()
}

fn digests(data: &[u8]) -> Digests {
    let mut hasher = BankHasher::new(&banks());
    hasher.update(data);
    hasher.finish()
}

/// An exposure log, and PCR 22 as a TPM would have it.
struct Mle {
    log: Box<ExposureLog>,
    pcr: Digests,
}

impl Mle {
    fn new() -> Self {
        let mut log = Box::new(ExposureLog::new());
        log.begin(&banks(), true).unwrap();
        Self { log, pcr: Digests::zero(&banks()) }
    }

    fn measure(&mut self, now_us: u64) {
        let digests = digests(self.log.seal(now_us).unwrap());
        self.pcr = extended_all(&self.pcr, &digests);
        self.log.extended(&digests).unwrap();
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; ExposureLog::<{ firmware::exposure::DEFAULT_SIZE }>::SIZE];
        self.log.write_to(&mut bytes, 0);
        bytes
    }
}

fn variable(name: &str) -> Option<Variable> {
    let utf16: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let guid = Guid::try_parse("8be4df61-93ca-11d2-aa0d-00e098032b8c").unwrap();
    Some(Variable { guid, name: Name::new(&utf16) })
}

/// Some of everything; a read is pending.
fn sample() -> Mle {
    let mut mle = Mle::new();
    mle.log.record(&Record { text: Some(Text::new("cordon 0.1.0")), ..Record::new(Kind::LAUNCH, 0, 1_500) });
    mle.measure(2_000);
    let call = |service, time_us| Record::call(service, Decision::SANDBOX, 1, time_us);
    let read = Record { duration_us: 1_234, exits: 12, ..call(Service::GetVariable, 3_000_000) };
    mle.log.record(&Record { variable: variable("BootOrder"), smis: 1, ..read });
    let ask = Record {
        decision: Decision::PASSED,
        service: Service::GetVariable as u8,
        smi_command: 0xef,
        ..Record::new(Kind::SMI, 1, 3_000_100)
    };
    mle.log.record(&Record { duration_us: 900, ..ask });
    mle.log.record(&Record {
        variable: variable(EVIL),
        status: 0x8000_0000_0000_000e,
        time_us: 3_100_000,
        ..read
    });
    mle.measure(4_001_334);
    let denied = Denied { ports: 3, last_port: 0xcf9, ..Denied::default() };
    mle.log.record(&Record {
        variable: variable(&"x".repeat(70)),
        denied: Some(denied),
        duration_us: 20_000,
        exits: 40,
        smis: 2,
        ..call(Service::SetVariable, 5_000_000)
    });
    let refused = Record {
        decision: Decision::LOCKED,
        status: 0x8000_0000_0000_001a,
        ..call(Service::SetTime, 5_200_000)
    };
    mle.log.record(&refused);
    mle.log.mark_late();
    mle.measure(6_000_000);
    let died = Record { service: Service::GetTime as u8, ..Record::new(Kind::SANDBOX_DIED, 0, 7_000_000) };
    mle.log.record(&Record { text: Some(Text::new("tried to read memory at 0x1000")), ..died });
    let access = Access { source: 0x00fa, address: 0xdead_0000, how: Access::WRITE };
    mle.log.record(&Record { access: Some(access), ..Record::new(Kind::IOMMU_FAULT, 0, 7_100_000) });
    let region = Region { base: 0x7e_0000, size: 0x1000, sha256: [0xab; 32] };
    mle.log.record(&Record { region: Some(region), ..Record::new(Kind::REGION_CHANGED, 0, 7_200_000) });
    mle.log.record(&Record::new(Kind(200), 0, 7_300_000));
    mle.measure(7_300_500);
    mle.log.record(&Record { time_us: 8_000_000, exits: 0, duration_us: 250, ..call(Service::GetTime, 0) });
    mle
}

/// A guest's folders, and the arguments that lead there.
struct Guest(Folder);

impl Guest {
    fn new(test: &str, mle: &Mle) -> Self {
        let guest = Self(Folder::new(test));
        guest.variable("Exposure", &mle.bytes());
        guest.variable("Status", b"version: 0.1.0\nPCRs 17-19 hold the launch: yes\n\x1b[31m<b>\n\0\0\0");
        let mut buffer = vec![0; 0x1000];
        let mut log = LogWriter::create(&mut buffer, &banks()).unwrap();
        for (pcr, name) in
            [(17, "SKINIT"), (17, "MLE"), (18, "SLRT policy"), (18, "kernel"), (19, "runtime code 0x1-0x2")]
        {
            log.append(pcr, 0x502, &digests(name.as_bytes()), name.as_bytes()).unwrap();
        }
        guest.variable("DrtmLog", &buffer);
        for bank in &banks() {
            let folder = format!("tpm0/pcr-{}", bank.alg.name().unwrap());
            let drtm = tpm::Log::parse(&buffer).unwrap();
            for pcr in 17..20 {
                guest.0.put(
                    &format!("{folder}/{pcr}"),
                    format!("{}\n", drtm.replay(bank.alg, pcr).unwrap()).as_bytes(),
                );
            }
            guest.0.put(&format!("{folder}/22"), mle.pcr.get(bank.alg).unwrap().to_string().as_bytes());
        }
        guest
    }

    fn variable(&self, name: &str, content: &[u8]) {
        self.0.put(&format!("efivars/{name}-{GUID}"), &[&[6, 0, 0, 0], content].concat());
    }

    fn cordon(&self, arguments: &[&str]) -> (bool, String, String) {
        cordon(&[arguments, &["--efivars", &self.0.path("efivars")]].concat())
    }

    fn verify(&self, more: &[&str]) -> (bool, String, String) {
        self.cordon(&[&["verify", "--sysfs", &self.0.path("tpm0")], more].concat())
    }
}

/// A log that had to drop its oldest batches.
fn spilled() -> Mle {
    let mut mle = Mle::new();
    for n in 0..500 {
        mle.log.record(&Record::call(Service::SetVariable, Decision::SANDBOX, 0, n));
        mle.measure(n);
    }
    assert!(mle.log.counters().spilled > 100);
    mle
}

/// [`sample`], then a call between two launches, and one more in the sandbox.
fn relaunched() -> Mle {
    let mut mle = sample();
    mle.measure(8_900_000);
    mle.pcr = Digests::zero(&banks());
    mle.log.relaunched(1, 0, 9_000_000).unwrap();
    let call = |decision, time_us| Record {
        variable: variable("Setup"),
        duration_us: 800_000,
        ..Record::call(Service::SetVariable, decision, 0, time_us)
    };
    mle.log.record(&call(Decision::RELAUNCH, 8_950_000));
    mle.measure(9_900_000);
    mle.log.record(&call(Decision::SANDBOX, 10_000_000));
    mle.measure(10_900_000);
    mle
}

const LOG: &str = "\
batch 0, measured after 0.002000 s:
     0        0.001500 cpu0   launch                    -                                        cordon 0.1.0
batch 1, measured after 4.001334 s:
     1        3.000000 cpu1   GetVariable               sandbox  SUCCESS               1.234 ms  12 exits, 1 SMI, BootOrder-8be4df61-93ca-11d2-aa0d-00e098032b8c
     2        3.000100 cpu1   SMI 0xef                  passed                         0.900 ms  for GetVariable
     3        3.100000 cpu1   GetVariable               sandbox  NOT_FOUND             1.234 ms  12 exits, </title><script>alert('x')</script>\\u{1b}[2J\\u{202e}-8be4df61-93ca-11d2-aa0d-00e098032b8c
batch 2, measured after 6.000000 s, late:
     4        5.000000 cpu1   SetVariable               sandbox  SUCCESS              20.000 ms  40 exits, 2 SMIs, xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx…-8be4df61-93ca-11d2-aa0d-00e098032b8c, denied ports 3 (last 0xcf9)
     5        5.200000 cpu1   SetTime                   locked   SECURITY_VIOLATION
batch 3, measured after 7.300500 s:
     6        7.000000 cpu0   sandbox died (GetTime)    -                                        tried to read memory at 0x1000
     7        7.100000 cpu0   IOMMU fault               -                                        0000:00:1f.2 write 0xdead0000
     8        7.200000 cpu0   region changed            -                                        0x7e0000, 0x1000 bytes, now SHA-256 abababababababababababababababababababababababababababababababab
     9        7.300000 cpu0   kind 200                  -
not measured yet:
    10*       8.000000 cpu1   GetTime                   sandbox  SUCCESS               0.250 ms
10 records in 4 batches, 1 pending; 0 records spilled, 0 lost; 1 batches late
";

#[test]
fn every_record_has_a_line() {
    let guest = Guest::new("lines", &sample());
    let (good, out, error) = guest.cordon(&["log"]);
    assert!(good, "{error}");
    assert_eq!(out, LOG);
    // The same from a file, with and without efivarfs's attributes.
    let copy = guest.0.put("copy", &sample().bytes());
    for file in [&copy, &guest.0.path(&format!("efivars/Exposure-{GUID}"))] {
        assert_eq!(cordon(&["log", file]).1, LOG);
    }
}

#[test]
fn programs_get_json() {
    let guest = Guest::new("json", &sample());
    let (good, out, _) = guest.cordon(&["log", "--json"]);
    let records: Vec<serde_json::Value> =
        out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(good && records.len() == 11);
    assert_eq!(
        records[4],
        serde_json::json!({
            "sequence": 4, "batch": 2, "late": true, "time_us": 5_000_000, "cpu": 1, "kind": "call",
            "service": "SetVariable", "smi_command": 0, "decision": "sandbox", "status": "SUCCESS", "status_code": 0,
            "duration_us": 20_000, "exits": 40, "smis": 2,
            "variable": {
                "guid": "8be4df61-93ca-11d2-aa0d-00e098032b8c", "name": "x".repeat(64), "name_length": 70,
            },
            "denied": {
                "ports": 3, "msrs": 0, "memory": 0, "last_port": 0xcf9, "last_msr": 0, "last_address": 0,
            },
        })
    );
    assert!(records[7]["service"].is_null() && records[7]["status"].is_null());
    assert_eq!(
        records[7]["access"],
        serde_json::json!({ "source": 250, "address": 0xdead_0000_u32, "how": "write" })
    );
    assert!(records[10]["batch"].is_null(), "pending");
}

#[test]
fn the_table_counts_by_service() {
    let guest = Guest::new("table", &sample());
    let (good, out, _) = guest.cordon(&["exposure"]);
    assert!(good);
    let expected = "\
what                       count errors           time      longest    exits   SMIs denied
GetTime                        1      0       0.250 ms     0.250 ms        0      0      0
SetTime                        1      1       0.000 ms     0.000 ms        0      0      0
GetVariable                    2      1       2.468 ms     1.234 ms       24      1      0
SetVariable                    1      0      20.000 ms    20.000 ms       40      2      3
SMI 0xef                       1      0       0.900 ms     0.900 ms        0      0      0
region changed                 1      0       0.000 ms     0.000 ms        0      0      0
sandbox died (GetTime)         1      0       0.000 ms     0.000 ms        0      0      0
IOMMU fault                    1      0       0.000 ms     0.000 ms        0      0      1
launch                         1      0       0.000 ms     0.000 ms        0      0      0
kind 200                       1      0       0.000 ms     0.000 ms        0      0      0
10 records in 4 batches, 1 pending; 0 records spilled, 0 lost; 1 batches late
";
    assert_eq!(out, expected);
}

#[test]
fn status_is_printed_without_its_escapes() {
    let guest = Guest::new("status", &sample());
    let (good, out, _) = guest.cordon(&["status"]);
    assert!(good);
    assert_eq!(out, "version: 0.1.0\nPCRs 17-19 hold the launch: yes\n\\u{1b}[31m<b>\n");
    let (good, _, error) = cordon(&["status", "--efivars", "/nowhere"]);
    assert!(
        !good && error.contains("cannot read /nowhere/Status-a720") && error.contains("guest of Cordon"),
        "{error}"
    );
}

#[test]
fn a_log_that_dropped_records_says_so_and_still_leads_to_the_pcr() {
    let guest = Guest::new("spilled", &spilled());
    let (good, out, error) = guest.cordon(&["log"]);
    assert!(good, "{error}");
    let first = out.lines().next().unwrap();
    let count: u64 = first.trim().strip_suffix(" records are not in the log").unwrap().parse().unwrap();
    let summary =
        format!("{} records in {} batches, 0 pending; {count} records spilled", 500 - count, 500 - count);
    assert!(out.lines().last().unwrap().starts_with(&summary), "{summary} in {out}");
    assert!(guest.verify(&[]).0);
}

#[test]
fn the_running_system_verifies_without_arguments() {
    let guest = Guest::new("running", &sample());
    let (good, out, error) = guest.verify(&[]);
    assert!(good, "{out}{error}");
    assert!(out.contains("the log explains all 8 values compared"), "{out}");
    assert!(out.contains("exposure log: 10 records in 4 batches"), "{out}");
}

#[test]
fn the_log_is_followed_through_a_relaunch() {
    let (before, mle) = (sample(), relaunched());
    let guest = Guest::new("relaunched", &mle);
    let (good, out, error) = guest.verify(&[]);
    assert!(good, "{out}{error}");
    assert!(out.contains("the log explains all 8 values compared"), "{out}");
    assert!(out.contains("14 records in 7 batches, 0 pending"), "{out}");
    assert!(out.contains("1 batches late; relaunched, round 1"), "{out}");
    let (good, out, error) = guest.cordon(&["log"]);
    assert!(good, "{error}");
    let mut end = before;
    end.measure(8_900_000);
    let value = end.pcr.get(HashAlg::SHA256).unwrap();
    let lines = format!(
        "\
batch 5, measured after 9.900000 s, first after relaunch 1:
    11        9.000000 cpu0   relaunched                -                                        round 1, PCR 22 was {value} before
    12        8.950000 cpu0   SetVariable               relaunch SUCCESS             800.000 ms  Setup-8be4df61-93ca-11d2-aa0d-00e098032b8c
batch 6, measured after 10.900000 s:
"
    );
    assert!(out.contains(&lines), "{lines}\nin\n{out}");
    let (_, out, _) = guest.cordon(&["log", "--json"]);
    assert!(out.contains(&format!("\"relaunch\":{{\"pcr22_before\":\"{value}\",\"round\":1}}")), "{out}");
    let (good, out, _) = guest.cordon(&["exposure"]);
    assert!(good && out.lines().any(|line| line.starts_with("relaunched ")), "{out}");
    let (page, sysfs) = (guest.0.path("report.html"), guest.0.path("tpm0"));
    let (good, _, error) = guest.cordon(&["report", "--sysfs", &sysfs, "--html", &page]);
    assert!(good, "{error}");
    let page = String::from_utf8(guest.0.get("report.html")).unwrap();
    assert!(page.contains("relaunched, round 1") && page.contains(&format!("PCR 22 was {value} before")));
}

#[test]
fn it_is_followed_when_the_first_chain_is_spilled() {
    let mut mle = relaunched();
    let mut guests = Vec::new();
    for n in 0..600 {
        mle.log.record(&Record::call(Service::SetVariable, Decision::SANDBOX, 0, 20_000_000 + n));
        mle.measure(20_000_000 + n);
        // The first chain is cut, is gone, and the relaunch with it.
        if [3, 5, 6].contains(&mle.log.counters().spilled_batches) {
            guests.push(mle.log.counters().spilled_batches);
            let guest = Guest::new(&format!("spilled-{n}"), &mle);
            let (good, out, error) = guest.verify(&[]);
            assert!(good, "{out}{error}");
        }
    }
    guests.dedup();
    assert_eq!(guests, [3, 5, 6]);
}

/// The log's events again, each with what `change` makes of its data and digests; without those for which it says no.
fn rewritten(bytes: &[u8], change: impl Fn(usize, &mut Vec<u8>, &mut Digests) -> bool) -> Vec<u8> {
    let mut out = vec![0; bytes.len()];
    let mut writer = LogWriter::create(&mut out, &banks()).unwrap();
    for (index, event) in tpm::Log::parse(bytes).unwrap().events().map(Result::unwrap).enumerate() {
        let (mut data, mut digests) = (event.data.to_vec(), event.digests.clone());
        if change(index, &mut data, &mut digests) {
            writer.append(event.pcr, event.event_type, &digests, &data).unwrap();
        }
    }
    out
}

/// What was before a relaunch is no longer in the PCR. Only the new chain's first record knows how it ended.
#[test]
fn verify_finds_what_was_changed_before_a_relaunch() {
    let mle = relaunched();
    let bytes = mle.bytes();
    let guest = Guest::new("old-chain", &mle);
    let verify = |log: &[u8]| {
        guest.variable("Exposure", log);
        guest.verify(&[])
    };
    assert!(verify(&rewritten(&bytes, |_, _, _| true)).0);
    let link = "relaunch 1 followed on the value";
    // The refused SetTime becomes one that succeeded; the digests are made to fit.
    let (good, out, _) = verify(&rewritten(&bytes, |index, data, new| {
        if let Some(at) = data.windows(8).position(|bytes| bytes == 0x8000_0000_0000_001a_u64.to_le_bytes()) {
            assert_eq!(index, 3);
            data[at..at + 8].fill(0);
            *new = digests(data);
        }
        true
    }));
    assert!(!good && out.contains("the log explains all 8 values") && out.contains(link), "{out}");
    assert!(!out.contains("is not that of its records"), "{out}");
    // All of the first chain is gone, by an anchor that fits the link.
    let mut end = sample();
    end.measure(8_900_000);
    let (good, out, _) = verify(&rewritten(&bytes, |index, data, digests| {
        if index == 0 {
            (data[20], data[28]) = (5, 11);
            *digests = end.pcr.clone();
        }
        index == 0 || index > 5
    }));
    assert!(!good && !out.contains(link), "{out}");
    assert!(
        out.contains("11 records are left out, but the newest batch knows of 0: the log was cut"),
        "{out}"
    );
}

#[test]
fn verify_finds_what_the_exposure_log_hides() {
    let mle = sample();
    let guest = Guest::new("hides", &mle);
    // Something was extended that the log does not have.
    let mut more = sample();
    more.measure(9_000_000);
    guest.0.put("tpm0/pcr-sha256/22", more.pcr.get(HashAlg::SHA256).unwrap().to_string().as_bytes());
    let (good, out, _) = guest.verify(&[]);
    assert!(!good && out.contains("1 of 8 values differ"), "{out}");

    // A record that says something else than what was measured; the digests are the measured ones.
    let guest = Guest::new("changed", &mle);
    let mut bytes = mle.bytes();
    let at = bytes.windows(9).position(|window| window == b"BootOrder").unwrap();
    bytes[at] = b'R';
    guest.variable("Exposure", &bytes);
    let (good, out, _) = guest.verify(&[]);
    assert!(!good && out.contains("its sha1 digest is not that of its records"), "{out}");
    let (good, _, error) = guest.cordon(&["log"]);
    assert!(!good && error.contains("its sha1 digest is not that of its records"), "{error}");

    // The oldest batch left out, with an anchor that leads to the PCR nonetheless.
    let guest = Guest::new("cut", &mle);
    let bytes = mle.bytes();
    let log = tpm::Log::parse(&bytes).unwrap();
    let first = log.events().nth(1).unwrap().unwrap().digests;
    let cut = rewritten(&bytes, |index, data, digests| {
        if index == 0 {
            (data[20], data[28]) = (1, 1);
            *digests = extended_all(digests, &first);
        }
        index != 1
    });
    guest.variable("Exposure", &cut);
    let (good, out, _) = guest.verify(&[]);
    assert!(!good && out.contains("the log explains all 8 values"), "{out}");
    assert!(
        out.contains("1 records are left out, but the newest batch knows of 0: the log was cut"),
        "{out}"
    );
}

#[test]
fn verify_takes_both_logs_from_files() {
    let guest = Guest::new("files", &sample());
    let (log, exposure) =
        (guest.0.path(&format!("efivars/DrtmLog-{GUID}")), guest.0.put("e", &sample().bytes()));
    let sysfs = guest.0.path("tpm0");
    let (good, out, error) = cordon(&["verify", &log, "--exposure", &exposure, "--sysfs", &sysfs]);
    assert!(good, "{out}{error}");
    let (good, out, _) = cordon(&["verify", &log, "--sysfs", &sysfs]);
    assert!(!good && out.contains("PCR 22 is the exposure log's, see --exposure"), "{out}");
}

#[test]
fn unlock_writes_one_variable() {
    let guest = Guest::new("unlock", &sample());
    let (good, out, error) = guest.cordon(&["unlock", "setvariable"]);
    assert!(good && out.contains("SetVariable is unlocked"), "{out}{error}");
    assert_eq!(guest.0.get(&format!("efivars/Unlock-{GUID}")), b"\x06\0\0\0SetVariable");
    // A file as a refused request leaves it in efivarfs; not every file system of a test has that flag.
    let file = guest.0.path(&format!("efivars/Unlock-{GUID}"));
    if Command::new("chattr").args(["+i", &file]).status().is_ok_and(|status| status.success()) {
        assert!(std::fs::write(&file, b"").is_err());
        assert!(guest.cordon(&["unlock", "ALL"]).0);
        assert!(guest.0.get(&format!("efivars/Unlock-{GUID}")).starts_with(b"\x06\0\0\0all"));
    }
    let (good, _, error) = guest.cordon(&["unlock", "SetVariables"]);
    assert!(
        !good && error.contains("neither a runtime service nor `all`") && error.contains("GetTime"),
        "{error}"
    );
    let (good, _, error) = cordon(&["unlock", "all", "--efivars", "/nowhere"]);
    assert!(!good && error.contains("all was not unlocked: /nowhere/Unlock-"), "{error}");
}

#[test]
fn the_public_tool_replays_a_saved_log() {
    let mle = sample();
    let guest = Guest::new("save", &mle);
    let saved = guest.0.path("saved");
    assert!(guest.cordon(&["log", "--save", &saved]).0);
    assert_eq!(cordon(&["log", &saved]).1, LOG);
    if !Path::new("/usr/bin/tpm2_eventlog").exists() {
        eprintln!("tpm2_eventlog is not installed: not run");
        return;
    }
    let output = Command::new("/usr/bin/tpm2_eventlog").arg(saved).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.contains("EV_EVENT_TAG"));
    for value in mle.pcr.as_slice() {
        assert!(text.contains(&format!("22 : 0x{value}")), "{value} not in\n{text}");
    }
}

#[test]
fn a_hostile_log_is_refused_with_field_value_and_limit() {
    let guest = Guest::new("hostile", &sample());
    let bytes = sample().bytes();
    let batch = bytes.windows(4).position(|window| window == b"CXPB").unwrap();
    for (at, value, message) in [
        (batch + 4, 0xff, "exposure log: batch.size is 0xff, limit 0x73"),
        (batch + 8, 2, "exposure log: batch.version is 0x2, limit 0x1"),
        (batch + 15, 0xff, "exposure log: batch.count is 0xff000001, limit 0x1"),
        (batch + 64, 0xff, "record.size needs 255 bytes, there are 59"),
        (batch + 69, 0xff, "exposure log: record.tails is 0xff, limit 0x1f"),
        (batch - 1, 0xff, "ends before its field event"),
        (24, 9, "exposure log: event log"),
    ] {
        let mut bytes = bytes.clone();
        bytes[at] = value;
        let file = guest.0.put("log", &bytes);
        for arguments in [&["log", &file][..], &["exposure", &file]] {
            let (good, _, error) = cordon(arguments);
            assert!(!good && error.contains(message), "{message} in {error}");
        }
    }
    let (good, _, error) = cordon(&["log", &guest.0.put("large", &vec![0; (16 << 20) + 1])]);
    assert!(!good && error.contains("limit 16777216"), "{error}");
}

#[test]
fn the_report_is_one_page_with_nothing_of_firmwares_in_it_that_a_browser_would_run() {
    let guest = Guest::new("report", &sample());
    let (page_at, sysfs) = (guest.0.path("report.html"), guest.0.path("tpm0"));
    let (good, _, error) = guest.cordon(&["report", "--sysfs", &sysfs, "--html", &page_at]);
    assert!(good, "{error}");
    let page = String::from_utf8(guest.0.get("report.html")).unwrap();
    assert!(page.contains("The logs explain every PCR value."));
    assert!(page.contains("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;\\u{1b}[2J\\u{202e}"));
    assert!(page.contains("\\u{1b}[31m&lt;b&gt;"), "of Status");
    assert!(
        !page.contains("<script")
            && !page.contains("http:")
            && !page.contains("https:")
            && !page.contains('\x1b')
    );
    assert!(page.contains("default-src 'none'"));
    assert_eq!(page.matches("<rect").count(), 11, "a mark for each record");
    assert_eq!(page.matches("<td class=good>matches</td>").count(), 8);
    for tag in [
        "section", "table", "tr", "td", "th", "svg", "text", "rect", "title", "li", "ol", "code", "span", "p",
    ] {
        let open = page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count();
        assert_eq!(open, page.matches(&format!("</{tag}>")).count(), "{tag}");
    }
    // A value that differs.
    guest.0.put("tpm0/pcr-sha256/17", "f".repeat(64).as_bytes());
    let (good, ..) = guest.cordon(&["report", "--sysfs", &sysfs, "--html", &page_at]);
    let page = String::from_utf8(guest.0.get("report.html")).unwrap();
    assert!(
        !good
            && page.contains("The logs do not explain the PCR values.")
            && page.contains("<td class=bad>differs</td>")
    );
}
