//! One bit of one file changed: the launch goes on, and the PCRs of just that file's chain tell.

use std::fs;
use std::path::{Path, PathBuf};

use tests::machine::Spec;
use tests::paths;

use super::{boot, pcrs};

/// The files of a launch, copied to a folder of their own.
struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (name, from) in [
            ("slb", paths::slb()),
            ("mle", paths::mle()),
            ("kernel", paths::kernel()),
            ("initrd", paths::initrd()),
        ] {
            fs::copy(from, dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join("config"), "# owner 0\n").unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn spec(&self) -> Spec {
        Spec {
            slb: self.path("slb"),
            mle: self.path("mle"),
            kernel: self.path("kernel"),
            initrd: self.path("initrd"),
            config: Some(self.path("config")),
            cmdline: "cordon.test=0".to_owned(),
            turns: true,
            ..Spec::default()
        }
    }
}

fn flip(file: &Path, at: usize) {
    let mut bytes = fs::read(file).unwrap();
    bytes[at] ^= 1;
    fs::write(file, bytes).unwrap();
}

fn find(file: &Path, text: &str) -> usize {
    let bytes = fs::read(file).unwrap();
    bytes.windows(text.len()).position(|w| w == text.as_bytes()).unwrap_or_else(|| panic!("no {text:?}"))
}

/// What is changed.
#[derive(Clone, Copy, Debug)]
enum Change {
    Slb,
    Mle,
    Kernel,
    Initrd,
    Cmdline,
    Config,
}

impl Change {
    /// Changes one bit that leaves everything running as it did.
    fn apply(self, files: &Files, spec: &mut Spec) {
        match self {
            Self::Slb => {
                // Padding at the end of what is measured.
                let bytes = fs::read(&spec.slb).unwrap();
                assert_eq!(bytes[bytes.len() - 16..], [0; 16], "no padding");
                flip(&spec.slb, bytes.len() - 1);
            }
            Self::Mle => flip(&spec.mle, find(&spec.mle, "deny all DMA")),
            // The version that boot loaders show.
            Self::Kernel => {
                let bytes = fs::read(&spec.kernel).unwrap();
                let version = usize::from(u16::from_le_bytes([bytes[0x20e], bytes[0x20f]])) + 0x200;
                flip(&spec.kernel, version);
            }
            // The time in the header of gzip.
            Self::Initrd => {
                assert_eq!(fs::read(&spec.initrd).unwrap()[..2], [0x1f, 0x8b]);
                flip(&spec.initrd, 4);
            }
            Self::Cmdline => spec.cmdline = "cordon.test=1".to_owned(),
            Self::Config => flip(&files.path("config"), "# owner ".len()),
        }
    }

    /// Which of PCR 17, 18, 19 hold it: `docs/measurements.md`.
    fn measured(self) -> [bool; 3] {
        match self {
            Self::Slb | Self::Mle => [true, false, false],
            Self::Kernel | Self::Initrd | Self::Cmdline | Self::Config => [false, true, false],
        }
    }
}

fn check(changes: &[Change]) {
    let files = Files::new();
    let run = |spec: &Spec| {
        let mut machine = boot(spec);
        let pcrs = pcrs(&mut machine);
        let console = machine.console();
        machine.power_off().unwrap();
        (pcrs, console)
    };
    let (good, _) = run(&files.spec());
    for &change in changes {
        let files = Files::new();
        let mut spec = files.spec();
        change.apply(&files, &mut spec);
        let (pcrs, console) = run(&spec);
        let differs = [0, 1, 2].map(|n| pcrs[n] != good[n]);
        assert_eq!(differs, change.measured(), "{change:?}: PCR 17, 18, 19 {pcrs:?}, {good:?} before");
        if matches!(change, Change::Mle) {
            assert!(console.contains("eeny all DMA"), "another MLE ran");
        }
    }
}

#[test]
fn one_bit_of_mle_or_command_line_changes_its_pcr_alone() {
    check(&[Change::Mle, Change::Cmdline]);
}

#[test]
#[ignore = "takes three minutes; `make test-all` runs it"]
fn one_bit_of_any_other_file_changes_its_pcr_alone() {
    check(&[Change::Slb, Change::Kernel, Change::Initrd, Change::Config]);
}
