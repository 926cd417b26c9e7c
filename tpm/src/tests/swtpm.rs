//! The driver, through the FIFO model, against a TPM that others wrote. Not run where swtpm is not
//! installed: everything here is also tested against the model.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::{ALL, a_launch_on};
use crate::model::{FakeTpm, Fifo};
use crate::{Contention, Digest, Error, HashAlg, Locality};

/// A running swtpm, ended and removed on drop.
struct Swtpm {
    child: Child,
    folder: PathBuf,
}

impl Drop for Swtpm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

impl Swtpm {
    /// A started TPM; none without swtpm.
    fn start() -> Option<Self> {
        let folder = std::env::temp_dir().join(format!("cordon-swtpm-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = |name: &str| folder.join(name).display().to_string();
        let child = Command::new("swtpm")
            .args(["socket", "--tpm2", "--flags", "not-need-init,startup-clear"])
            .arg("--tpmstate")
            .arg(format!("dir={}", folder.display()))
            .arg("--ctrl")
            .arg(format!("type=unixio,path={}", path("ctrl")))
            .arg("--server")
            .arg(format!("type=unixio,path={}", path("data")))
            .stdout(Stdio::null())
            .spawn();
        match child {
            Ok(child) => Some(Self { child, folder }),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => panic!("{error}"),
        }
    }

    fn connect(&self, name: &str) -> UnixStream {
        for _ in 0..200 {
            if let Ok(stream) = UnixStream::connect(self.folder.join(name)) {
                return stream;
            }
            std::thread::sleep(Duration::from_millis(25));
        }
        panic!("swtpm does not listen at {name}");
    }
}

/// A request on the control channel, answered by a result of four bytes.
fn control(ctrl: &mut UnixStream, command: u32, data: &[u8]) {
    ctrl.write_all(&[&command.to_be_bytes(), data].concat()).unwrap();
    let mut result = [0xff; 4];
    ctrl.read_exact(&mut result).unwrap();
    assert_eq!(result, [0; 4], "control command {command}");
}

#[test]
fn a_launch_on_swtpm() {
    const SET_LOCALITY: u32 = 5;
    const HASH_START: u32 = 6;
    const HASH_DATA: u32 = 7;
    const HASH_END: u32 = 8;
    let Some(swtpm) = Swtpm::start() else {
        eprintln!("swtpm is not installed: not run");
        return;
    };
    let (mut ctrl, mut data) = (swtpm.connect("ctrl"), swtpm.connect("data"));
    // What SKINIT makes the CPU do.
    let block = b"the block";
    control(&mut ctrl, HASH_START, &[]);
    control(&mut ctrl, HASH_DATA, &[&(block.len() as u32).to_be_bytes()[..], block].concat());
    control(&mut ctrl, HASH_END, &[]);

    let mut remote = FakeTpm::with(&[]);
    remote.remote = Some(Box::new(move |locality, command| {
        control(&mut ctrl, SET_LOCALITY, &[locality]);
        data.write_all(command).unwrap();
        let mut response = vec![0; 10];
        data.read_exact(&mut response).unwrap();
        let size = u32::from_be_bytes(response[2..6].try_into().unwrap()) as usize;
        response.resize(size, 0);
        data.read_exact(&mut response[10..]).unwrap();
        response
    }));
    let fifo = Fifo::new(remote);
    let mut tpm = a_launch_on(fifo);
    assert_eq!(tpm.banks().iter().map(|bank| bank.alg).collect::<Vec<_>>(), ALL);

    // Locality 0 can neither go on with the launch's PCRs nor cap them; locality 2 can cap them.
    tpm.acquire(Locality::Zero, Contention::LAUNCH).unwrap();
    assert_eq!(tpm.cap(&[17]), Err(Error::Refused { command: 0x182, rc: 0x907 }));
    tpm.acquire(Locality::Two, Contention::LAUNCH).unwrap();
    tpm.cap(&[17, 18, 19, 22]).unwrap();
    let cap = *crate::Digests::cap(tpm.banks()).get(HashAlg::SHA256).unwrap();
    let capped = crate::log::extended(&Digest::zero(cap.bank()), &cap);
    assert_eq!(tpm.read_pcr(HashAlg::SHA256, 22).unwrap(), capped);
}
