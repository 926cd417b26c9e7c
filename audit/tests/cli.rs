//! `cordon` as a user runs it. The expected PCR values were computed by another program (Python's
//! hashlib over bytes packed by hand), not by this crate.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    reason = "helpers of tests stop their test by a panic"
)]

mod common;

use std::ops::Deref;
use std::path::Path;
use std::process::Command;

use common::{Folder, cordon};
use tpm::{Bank, BankHasher, Banks, Digests, HashAlg, LogWriter};

const SHA1_17: &str = "408472e3f092fa03052be61a2370ae46170601be";
const SHA1_18: &str = "9e66787693b50d8b5c973ef56dd9be77dcc5bb2e";
const SHA256_17: &str = "7f99a616d88914d55f49aeef95a3fdc90d38f585f0737c96d5a6f05e9943e55d";
const SHA256_18: &str = "f99e02c4d70b59d026ce239c47adbd6c63c3dc00e0faec4d021abd34cf4aa88e";
/// Without initrd, command line and configuration.
const SHA256_18_BARE: &str = "8330adf04dae61a4e7a578fd2cc40b736642ae3ffa6126f5c935149854421448";
const SHA384_18: &str = "3c79dfa65f2dc5149d824ac8243d3621abd813902a4c543d562b5ff117dd501d\
                         31036080b3501267fc75346778a48775";
const POLICY_SHA256: &str = "7ad7e67e311b9a664fdc89e56db0155bb34ba624b1c0d6900f10b42bcac4b369";

/// The files of a launch.
struct Files(Folder);

impl Deref for Files {
    type Target = Folder;

    fn deref(&self) -> &Folder {
        &self.0
    }
}

impl Files {
    fn new(test: &str) -> Self {
        let files = Self(Folder::new(test));
        let mut slb = [&[0x20, 0, 0, 0x10][..], b"CORDNSLB", &[0; 4]].concat();
        slb.resize(0x1000, b'S');
        files.put("slb", &slb);
        let mut mle = b"CORDNMLE\x03\0\0\0\0\x01\0\0".to_vec();
        mle.extend(0x3000_u64.to_le_bytes());
        mle.extend((16_u64 << 20).to_le_bytes());
        mle.extend(0x800_u32.to_le_bytes());
        mle.resize(0x3000, b'M');
        files.put("mle", &mle);
        let mut kernel = vec![0; 0x4000];
        kernel[0x1f1] = 3;
        kernel[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        kernel[0x202..0x208].copy_from_slice(b"HdrS\x0f\x02");
        kernel[0x236] = 0x3f;
        kernel[0x238..0x23a].copy_from_slice(&2047_u16.to_le_bytes());
        files.put("kernel", &kernel);
        files.put("initrd-1", b"abcde");
        files.put("initrd-2", b"wxyz");
        files.put("cmdline", b"console=ttyS0 quiet\n");
        files.put("config", b"GetTime = sandbox\n");
        files
    }

    /// Arguments that predict the whole launch, and more.
    fn predict(&self, more: &[&str]) -> (bool, String, String) {
        let mut all = vec!["predict".to_owned()];
        for (option, file) in [
            ("--slb", "slb"),
            ("--mle", "mle"),
            ("--kernel", "kernel"),
            ("--initrd", "initrd-1"),
            ("--initrd", "initrd-2"),
            ("--config", "config"),
        ] {
            all.extend([option.to_owned(), self.path(file)]);
        }
        all.extend(more.iter().map(|more| (*more).to_owned()));
        cordon(&all.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Puts a SINIT module, and an MLE with the header by which SINIT finds it: `sinit`, `mle-txt`.
    fn put_txt(&self) {
        let word = |value: u32| value.to_le_bytes();
        let mut module = vec![0; 0x600];
        let mut put = |at: usize, bytes: &[u8]| module[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &[2, 0, 0, 0, 161, 0, 0, 0]);
        put(16, &word(0x8086));
        put(24, &word(0x600 / 4));
        put(120, &[64, 0, 0, 0, 143, 0, 0, 0]);
        put(128, &[b'K'; 256]);
        put(388, &[b'S'; 256]);
        let info = (161 + 143) * 4;
        put(info, &hex::decode("aa3ac07fa746db182eac698f8d417f5a").unwrap());
        put(info + 16, &[1, 5, 48, 0]);
        put(info + 20, &word(0x500));
        put(info + 24, &[7, 0, 0, 0, 1, 0, 2, 0, 0x2e, 2, 0, 0]);
        put(info + 40, &word(0x540));
        self.put("sinit", &module);
        let mut mle = self.get("mle");
        mle[12..16].copy_from_slice(&word(0x100));
        let mut header = hex::decode("5aac82906f47a7740f5c55a2cb51b642").unwrap();
        header.extend([52, 0x2_0002, 0x100, 0, 0, 0x3000, 0x227, 0, 0].into_iter().flat_map(word));
        mle[0x800..0x800 + header.len()].copy_from_slice(&header);
        self.put("mle-txt", &mle);
    }

    /// The log that SLB stage and MLE write of that launch.
    fn log(&self, algs: &[HashAlg]) -> Vec<u8> {
        let banks: Banks = algs.iter().map(|alg| Bank::computed(*alg).unwrap()).collect();
        let digests = |data: &[u8]| -> Digests {
            let mut hasher = BankHasher::new(&banks);
            hasher.update(data);
            hasher.finish()
        };
        let mut policy = Vec::new();
        for (kind, name) in [(0, "configuration"), (0, "kernel"), (6, "initrd"), (4, "command line")] {
            policy.extend([18, 0, kind, 0]);
            policy.extend([0; 20]);
            policy.extend(name.bytes());
            policy.resize(policy.len().next_multiple_of(56), 0);
        }
        let mut buffer = vec![0; 0x8000];
        let mut log = LogWriter::create(&mut buffer, &banks).unwrap();
        for (pcr, name, data) in [
            (17, "SKINIT", self.get("slb")),
            (17, "MLE", tpm::digest_of(HashAlg::SHA256, &[&self.get("mle")]).unwrap().as_bytes().to_vec()),
            (18, "SLRT policy", policy),
            (18, "configuration", self.get("config")),
            (18, "kernel", self.get("kernel")),
            (18, "initrd", b"abcde\0\0\0wxyz".to_vec()),
            (18, "command line", b"console=ttyS0 quiet".to_vec()),
        ] {
            log.append(pcr, 0x502, &digests(&data), name.as_bytes()).unwrap();
        }
        buffer
    }
}

#[test]
fn predict_gives_the_values_computed_elsewhere() {
    let files = Files::new("predict");
    let (good, out, error) = files.predict(&[
        "--cmdline",
        "console=ttyS0 quiet",
        "--bank",
        "sha1",
        "--bank",
        "sha256",
        "--bank",
        "sha384",
    ]);
    assert!(good, "{error}");
    for (bank, pcr, value) in
        [("sha1", 17, SHA1_17), ("sha1", 18, SHA1_18), ("sha256", 17, SHA256_17), ("sha256", 18, SHA256_18)]
    {
        let section = out.split_once(&format!("{bank}:\n")).unwrap().1;
        assert!(section.contains(&format!("\n  {pcr}: 0x{value}\n")), "{bank} {pcr} in\n{out}");
    }
    assert!(out.contains(SHA384_18));
    assert!(out.contains(&format!("# PCR 18 SLRT policy          {POLICY_SHA256}")), "{out}");
}

#[test]
fn predict_gives_what_senter_and_sinit_extend() {
    let files = Files::new("senter");
    files.put_txt();
    let predict = |more: &[&str]| {
        let mut all = vec!["predict".to_owned(), "--cmdline".to_owned(), "console=ttyS0 quiet".to_owned()];
        for (option, file) in [
            ("--sinit", "sinit"),
            ("--mle", "mle-txt"),
            ("--kernel", "kernel"),
            ("--initrd", "initrd-1"),
            ("--initrd", "initrd-2"),
            ("--config", "config"),
        ] {
            all.extend([option.to_owned(), files.path(file)]);
        }
        all.extend(more.iter().map(|more| (*more).to_owned()));
        cordon(&all.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let (good, out, error) = predict(&["--bank", "sha256", "--bank", "sha1"]);
    assert!(good, "{error}");
    for value in [
        "17: 0xf777ab4544b220a96bf6232b32875b9afa792e2f6f8f2463afc72bff822bb30f",
        "18: 0x96f7e5c71092c8729d43c8ac409ee8c1bba4dc6f0cf1bf4871f0b86623dc2202",
        "17: 0xac927a7b61146c4ddd50f96630995aa8e36aa0a7",
        "18: 0x0fce8da6bfc998d3f4cbfb0a9a3746fd64d813f6",
        "# PCR 17 MLE_HASH ",
    ] {
        assert!(out.contains(value), "{value} in\n{out}");
    }
    let of_platform = "000102030405060708090a0b0c0d0e0f10111213";
    let (good, out, error) = predict(&["--biosac", of_platform, "--scrtm", "1", "--lcp-control", "2"]);
    assert!(good, "{error}");
    assert!(out.contains("17: 0x4bd7523e4e3807b5476a314b279ec9790132ec22ef5785e5369770856abda491"), "{out}");
    assert!(out.contains("18: 0x5202cbcfd651af856933c414f08a8c6e7b02a38b609c70a59169ab36ede65332"), "{out}");
    // Either what SKINIT starts or what SENTER does.
    assert!(!predict(&["--slb", &files.path("slb")]).0);
    files.put("sinit", b"no module");
    let (good, _, error) = predict(&[]);
    assert!(!good && error.contains("header ends at 0x80, the module at 0x9"), "{error}");
}

#[test]
fn a_command_line_from_a_file_is_the_same_without_its_newline() {
    let files = Files::new("file");
    let (good, out, _) = files.predict(&["--cmdline-file", &files.path("cmdline")]);
    assert!(good && out.contains(SHA256_18), "{out}");
}

#[test]
fn absent_pieces_are_measured_as_empty() {
    let files = Files::new("bare");
    let (slb, mle, kernel) = (files.path("slb"), files.path("mle"), files.path("kernel"));
    let (good, out, error) = cordon(&["predict", "--slb", &slb, "--mle", &mle, "--kernel", &kernel]);
    assert!(good, "{error}");
    assert!(out.contains(SHA256_17) && out.contains(SHA256_18_BARE), "{out}");
}

#[test]
fn predict_speaks_json() {
    let files = Files::new("json");
    let (good, out, _) = files.predict(&["--cmdline", "console=ttyS0 quiet", "--json"]);
    assert!(good);
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    let bank = &json["banks"]["sha256"];
    assert_eq!(bank["pcrs"]["17"], SHA256_17);
    assert_eq!(bank["pcrs"]["18"], SHA256_18);
    assert_eq!(bank["events"].as_array().unwrap().len(), 7);
    assert_eq!(bank["events"][2]["event"], "SLRT policy");
    assert_eq!(bank["events"][2]["digest"], POLICY_SHA256);
}

#[test]
fn predict_refuses_what_the_loader_refuses() {
    let files = Files::new("refuse");
    files.put("slb", b"not an SLB");
    let (good, _, error) = files.predict(&[]);
    assert!(!good);
    assert!(error.contains("slb: not a Cordon SLB"), "{error}");
    let (good, _, error) = cordon(&["predict", "--slb", "x", "--mle", "/nowhere", "--kernel", "y"]);
    assert!(!good && error.contains("cannot read /nowhere"), "{error}");
}

#[test]
fn verify_agrees_with_every_source_of_values() {
    let files = Files::new("agree");
    let log = files.put("log", &files.log(&[HashAlg::SHA1, HashAlg::SHA256]));
    let predicted = files.predict(&["--cmdline", "console=ttyS0 quiet"]).1;
    let predicted = files.put("predicted", predicted.as_bytes());
    let zero = "0".repeat(64);
    let read = format!("  sha256:\n    0 : 0x{}\n    17: 0x{SHA256_17}\n    22: 0x{zero}\n", "9".repeat(64));
    let read = files.put("pcrread", read.as_bytes());
    files.put("tpm0/pcr-sha1/17", format!("{}\n", SHA1_17.to_uppercase()).as_bytes());
    files.put("tpm0/pcr-sha256/18", format!("{SHA256_18}\n").as_bytes());
    for (arguments, count) in [
        (vec!["--pcrs", predicted.as_str()], 2),
        (vec!["--pcrs", &read], 2),
        (vec!["--pcrs", &read, "--pcrs", &predicted], 4),
        (vec!["--sysfs", &files.path("tpm0")], 2),
        (vec!["--pcr", &format!("17={SHA256_17}"), "--pcr", &format!("sha1:18={SHA1_18}")], 2),
    ] {
        let (good, out, error) = cordon(&[&["verify", &log][..], &arguments].concat());
        assert!(good, "{arguments:?}: {out}{error}");
        assert!(out.contains(&format!("the log explains all {count} values")), "{arguments:?}: {out}");
    }
    let (good, out, _) = cordon(&["verify", &log]);
    assert!(good && out.contains("no PCR values were given"));
    assert!(out.contains("EV_SLAUNCH            SLRT policy"), "{out}");
    assert!(out.contains(POLICY_SHA256));
}

#[test]
fn verify_fails_when_anything_differs() {
    let files = Files::new("differ");
    let log = files.put("log", &files.log(&[HashAlg::SHA256]));
    let ones = "f".repeat(64);
    for (arguments, found) in [
        // A machine on which no launch happened.
        (["--pcr", &*format!("17={ones}")], "DIFFERS (--pcr)"),
        // Exposures that this log does not have.
        (["--pcr", &*format!("22={ones}")], "DIFFERS (--pcr)"),
        // A bank that nothing was measured into.
        (["--pcr", &*format!("17={SHA1_17}")], "IN A BANK THAT THE LOG LACKS"),
    ] {
        let (good, out, _) = cordon(&["verify", &log, arguments[0], arguments[1]]);
        assert!(!good, "{out}");
        assert!(out.contains(found) && out.contains("1 of 1 values differ"), "{out}");
    }
    let mut bytes = files.log(&[HashAlg::SHA256]);
    bytes[100] ^= 1;
    let log = files.put("log", &bytes);
    assert!(!cordon(&["verify", &log, "--pcr", &format!("17={SHA256_17}")]).0);
}

#[test]
fn verify_never_succeeds_by_comparing_nothing() {
    let files = Files::new("nothing");
    let log = files.put("log", &files.log(&[HashAlg::SHA256]));
    let other = files.put("pcrs", format!("sha256:\n3: 0x{}\n", "0".repeat(64)).as_bytes());
    let (good, _, error) = cordon(&["verify", &log, "--pcrs", &other]);
    assert!(!good && error.contains("none of the values given"), "{error}");
    let (good, _, error) = cordon(&["verify", &log, "--pcr", &format!("3={}", "0".repeat(64))]);
    assert!(!good && error.contains("no event of PCR 3"), "{error}");
}

#[test]
fn a_broken_log_is_refused_with_the_place() {
    let files = Files::new("broken");
    let mut bytes = files.log(&[HashAlg::SHA256]);
    bytes[65 + 4 + 4] = 2;
    let log = files.put("log", &bytes);
    let (good, _, error) = cordon(&["verify", &log]);
    assert!(!good);
    assert!(error.contains("record at offset 0x41: field digest count has value 0x2"), "{error}");
    let (good, _, error) = cordon(&["verify", &files.put("log", &[0; 20])]);
    assert!(!good && error.contains("ends before its field first record"), "{error}");
}

#[test]
fn event_data_cannot_write_to_the_terminal() {
    let files = Files::new("escape");
    let banks: Banks = Bank::computed(HashAlg::SHA256).into_iter().collect();
    let mut buffer = vec![0; 512];
    let mut log = LogWriter::create(&mut buffer, &banks).unwrap();
    log.append(17, 3, &Digests::cap(&banks), b"\x1b[2J\xff").unwrap();
    let (good, out, _) = cordon(&["verify", &files.put("log", &buffer)]);
    assert!(good && !out.contains('\x1b') && out.contains(r"\x1b[2J\xff"), "{out}");
    assert!(out.contains("logged but not extended"));
}

#[test]
fn the_public_tool_replays_to_the_predicted_values() {
    let files = Files::new("tool");
    let mut bytes = files.log(&[HashAlg::SHA1, HashAlg::SHA256]);
    let end = bytes.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    bytes.truncate(end);
    let log = files.put("log", &bytes);
    if !Path::new("/usr/bin/tpm2_eventlog").exists() {
        eprintln!("tpm2_eventlog is not installed: not run");
        return;
    }
    let output = Command::new("/usr/bin/tpm2_eventlog").arg(log).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    for value in [SHA1_17, SHA1_18, SHA256_17, SHA256_18] {
        assert!(text.contains(&format!("0x{value}")), "{value} not in\n{text}");
    }
}

#[test]
fn a_reader_that_leaves_early_is_no_failure_of_the_program() {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Stdio;
    const SIGPIPE: i32 = 13;
    let files = Files::new("pipe");
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let (slb, mle, kernel) = (files.path("slb"), files.path("mle"), files.path("kernel"));
    let arguments = ["predict", "--slb", &slb, "--mle", &mle, "--kernel", &kernel];
    let mut command = Command::new(env!("CARGO_BIN_EXE_cordon"));
    let child = command.args(arguments).stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(output.status.signal(), Some(SIGPIPE));
}
