//! A software TPM, and a proxy on its control channel through which the bench makes the bus cycles of
//! locality 4 that no emulated CPU makes.
//!
//! swtpm serves one control connection and QEMU wants it. The proxy holds that connection, forwards QEMU's
//! requests one by one, and between two of them puts in its own.
//!
//! Spec: swtpm `include/swtpm/tpm_ioctl.h`; all numbers big endian.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};

use crate::child::{self, Guarded};
use crate::run_dir::RunDir;
use crate::senter::crb::Chip;

const CMD_INIT: u32 = 2;
const CMD_SET_LOCALITY: u32 = 5;
const CMD_SET_DATAFD: u32 = 16;
const CMD_HASH_START: u32 = 6;
const CMD_HASH_DATA: u32 = 7;
const CMD_HASH_END: u32 = 8;
/// swtpm's limit for the data of one request.
const HASH_CHUNK: usize = 4096;
/// Longest control message either side sends here; larger ones only exist for migration.
const MESSAGE_MAX: usize = 65536;
const REPLY_TIME: Duration = Duration::from_secs(30);

/// A running software TPM. Dropping it ends it.
pub struct Swtpm {
    _process: Guarded,
    control: Control,
}

/// The control connection, shared between the proxy and the bench.
#[derive(Clone)]
pub struct Control(Arc<Mutex<UnixStream>>);

impl Swtpm {
    /// Starts a fresh TPM with its state in `dir`, and the proxy at the socket `tpm.sock`. `banks` are its active PCR
    /// banks, separated by commas.
    pub fn start(dir: &RunDir, banks: &str) -> Result<Self> {
        std::fs::create_dir(dir.file("tpm"))?;
        let made = Command::new("swtpm_setup")
            .current_dir(dir.path())
            .args(["--tpm2", "--tpmstate", "tpm", "--pcr-banks", banks])
            .output()
            .context("starting swtpm_setup")?;
        let said = String::from_utf8_lossy(&made.stdout);
        ensure!(made.status.success(), "swtpm_setup with PCR banks {banks}: {}", said.trim());
        let mut command = child::command("swtpm");
        command.current_dir(dir.path()).args([
            "socket",
            "--tpm2",
            "--tpmstate",
            "dir=tpm",
            "--ctrl",
            "type=unixio,path=swtpm.sock",
            "--flags",
            "startup-clear",
        ]);
        let process = Guarded::spawn("swtpm", command, &dir.file("swtpm.log"))?;
        let control = Control::new(dir.connect("swtpm.sock")?)?;
        let listener = UnixListener::bind(dir.socket("tpm.sock"))?;
        let forward = control.clone();
        thread::spawn(move || {
            // One client, QEMU. When either side goes away the other sees its connection close.
            if let Ok((client, _)) = listener.accept() {
                let _ = forward.serve(&client);
            }
        });
        Ok(Self { _process: process, control })
    }

    /// The control connection, for the player of the DRTM event.
    pub fn control(&self) -> Control {
        self.control.clone()
    }
}

impl Control {
    fn new(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(REPLY_TIME))?;
        Ok(Self(Arc::new(Mutex::new(stream))))
    }

    /// Forwards requests and replies, and the descriptors that requests carry, until one side closes.
    fn serve(&self, client: &UnixStream) -> Result<()> {
        let mut message = vec![0; MESSAGE_MAX];
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::CMSG_CLOEXEC;
            let received =
                rustix::net::recvmsg(client, &mut [IoSliceMut::new(&mut message)], &mut ancillary, flags)?;
            if received.bytes == 0 {
                return Ok(());
            }
            let descriptors: Vec<OwnedFd> = ancillary
                .drain()
                .filter_map(|m| match m {
                    RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                    _ => None,
                })
                .flatten()
                .collect();
            let reply = self.exchange(&message[..received.bytes], &descriptors)?;
            (&*client).write_all(&reply)?;
        }
    }

    /// One request and its reply, with nobody else's in between.
    fn exchange(&self, request: &[u8], descriptors: &[OwnedFd]) -> Result<Vec<u8>> {
        let mut stream = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !borrowed.is_empty() {
            let fits = ancillary.push(SendAncillaryMessage::ScmRights(&borrowed));
            ensure!(fits, "swtpm: more descriptors than a request may carry");
        }
        let sent =
            rustix::net::sendmsg(&*stream, &[IoSlice::new(request)], &mut ancillary, SendFlags::NOSIGNAL)?;
        stream.write_all(&request[sent..])?;
        let mut reply = vec![0; MESSAGE_MAX];
        let n = stream.read(&mut reply).context("swtpm: no reply on the control channel")?;
        ensure!(n > 0, "swtpm: closed its control channel");
        reply.truncate(n);
        Ok(reply)
    }

    fn request(&self, command: u32, payload: &[u8]) -> Result<()> {
        let mut request = command.to_be_bytes().to_vec();
        request.extend_from_slice(payload);
        let reply = self.exchange(&request, &[])?;
        ensure!(reply == [0; 4], "swtpm: control command {command} gave {}", hex::encode(&reply));
        Ok(())
    }

    /// Turns the TPM on for a machine whose TPM interface the bench plays, and gives it.
    pub fn link(&self) -> Result<Link> {
        let (ours, theirs) = UnixStream::pair()?;
        let theirs = OwnedFd::from(theirs);
        let reply = self.exchange(&CMD_SET_DATAFD.to_be_bytes(), &[theirs])?;
        ensure!(reply == [0; 4], "swtpm: data channel refused: {}", hex::encode(&reply));
        self.request(CMD_INIT, &[0; 4])?;
        ours.set_read_timeout(Some(REPLY_TIME))?;
        let mut link = Link { control: self.clone(), data: ours };
        // TPM2_Startup(CLEAR), the first thing that firmware does.
        let started = link.command(0, &[0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x44, 0, 0])?;
        ensure!(started[6..10] == [0; 4], "swtpm: start-up gave {}", hex::encode(&started));
        Ok(link)
    }

    /// The TPM's part of a DRTM event: it resets the dynamic PCRs and extends PCR 17 with the digest of
    /// `data` in every bank.
    ///
    /// Spec: \[TPM2\] `_TPM_Hash_Start`, `_TPM_Hash_Data`, `_TPM_Hash_End`.
    pub fn drtm_hash(&self, data: &[u8]) -> Result<()> {
        self.request(CMD_HASH_START, &[])?;
        for chunk in data.chunks(HASH_CHUNK) {
            let mut payload = u32::try_from(chunk.len())?.to_be_bytes().to_vec();
            payload.extend_from_slice(chunk);
            self.request(CMD_HASH_DATA, &payload)?;
        }
        self.request(CMD_HASH_END, &[])
    }
}

/// A TPM's commands, by the bench itself.
pub struct Link {
    control: Control,
    data: UnixStream,
}

impl Chip for Link {
    fn command(&mut self, locality: u8, command: &[u8]) -> Result<Vec<u8>> {
        self.control.request(CMD_SET_LOCALITY, &[locality])?;
        self.data.write_all(command).context("swtpm: command")?;
        let mut response = vec![0; 10];
        self.data.read_exact(&mut response).context("swtpm: response")?;
        let size = u32::from_be_bytes([response[2], response[3], response[4], response[5]]) as usize;
        ensure!((10..=HASH_CHUNK).contains(&size), "swtpm: response of {size} bytes");
        response.resize(size, 0);
        self.data.read_exact(&mut response[10..]).context("swtpm: response")?;
        Ok(response)
    }
}

/// A control channel to a TPM that keeps all requests and gives each the result `result`.
#[cfg(test)]
pub(crate) fn fake_tpm(result: u32) -> (Control, Arc<Mutex<Vec<Vec<u8>>>>) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let requests = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&requests);
    thread::spawn(move || {
        let mut request = vec![0; MESSAGE_MAX];
        while let Ok(n @ 1..) = theirs.read(&mut request) {
            log.lock().unwrap().push(request[..n].to_vec());
            theirs.write_all(&result.to_be_bytes()).unwrap();
        }
    });
    (Control::new(ours).unwrap(), requests)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Seek;
    use std::os::fd::AsRawFd;

    #[test]
    fn a_hash_is_sent_in_pieces_of_exact_length() {
        let (control, seen) = fake_tpm(0);
        control.drtm_hash(&[7; HASH_CHUNK + 5]).unwrap();
        let seen = seen.lock().unwrap();
        let lengths: Vec<_> = seen.iter().map(Vec::len).collect();
        assert_eq!(lengths, [4, 8 + HASH_CHUNK, 8 + 5, 4]);
        assert_eq!(seen[2][..8], [0, 0, 0, 7, 0, 0, 0, 5]);
    }

    #[test]
    fn a_refusing_tpm_is_an_error() {
        let (control, _) = fake_tpm(9);
        assert!(control.drtm_hash(b"x").is_err());
    }

    #[test]
    fn a_descriptor_passes_through_the_proxy() {
        let (upstream, tpm_end) = UnixStream::pair().unwrap();
        let control = Control::new(upstream).unwrap();
        let (qemu, proxy_end) = UnixStream::pair().unwrap();
        thread::spawn(move || control.serve(&proxy_end));
        // QEMU sends SET_DATAFD with a descriptor.
        let mut file: File = tempfile::tempfile().unwrap();
        file.write_all(b"data").unwrap();
        let fds = [file.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        let request = IoSlice::new(&[0, 0, 0, 0x10]);
        rustix::net::sendmsg(&qemu, &[request], &mut ancillary, SendFlags::empty()).unwrap();
        // The TPM receives both.
        let mut bytes = [0; 16];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let message = &mut [IoSliceMut::new(&mut bytes)];
        let got = rustix::net::recvmsg(&tpm_end, message, &mut ancillary, RecvFlags::empty()).unwrap();
        assert_eq!(got.bytes, 4);
        let Some(RecvAncillaryMessage::ScmRights(mut fds)) = ancillary.drain().next() else {
            panic!("no fd")
        };
        let mut received = File::from(fds.next().unwrap());
        assert_ne!(received.as_raw_fd(), file.as_raw_fd());
        received.rewind().unwrap();
        let mut text = String::new();
        received.read_to_string(&mut text).unwrap();
        assert_eq!(text, "data");
        // The reply goes back.
        (&tpm_end).write_all(&[0; 4]).unwrap();
        let mut reply = [1; 4];
        (&qemu).read_exact(&mut reply).unwrap();
        assert_eq!(reply, [0; 4]);
    }
}
