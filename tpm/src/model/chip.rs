//! What is behind the interface: PCR banks and three commands.

use std::collections::VecDeque;

use crate::bank::{Bank, Digest, HashAlg};
use crate::log::extended;

const RC_LOCALITY: u32 = 0x907;
const RC_COMMAND_CODE: u32 = 0x143;
const RC_VALUE: u32 = 0x84;

/// A TPM elsewhere: takes a locality and a command, gives the response.
pub type Remote = Box<dyn FnMut(u8, &[u8]) -> Vec<u8>>;

/// PCR banks, and how the next commands are answered.
pub struct FakeTpm {
    banks: Vec<(Bank, [Digest; 24])>,
    /// Response codes for the next commands, instead of running them.
    pub refuse: VecDeque<u32>,
    /// Whole responses for the next commands, instead of running them.
    pub answer: VecDeque<Vec<u8>>,
    /// Runs the commands instead of this model.
    pub remote: Option<Remote>,
    /// Locality and bytes of each command, in order.
    pub seen: Vec<(u8, Vec<u8>)>,
}

impl FakeTpm {
    /// A started TPM on which no DRTM event has happened: PCR 17–22 are all ones.
    pub fn new(banks: &[Bank]) -> Self {
        let start = |bank: &Bank| {
            let ones = Digest::new(bank.alg, &vec![0xff; bank.size.into()]).unwrap();
            (
                *bank,
                core::array::from_fn(|pcr| if (17..23).contains(&pcr) { ones } else { Digest::zero(*bank) }),
            )
        };
        Self {
            banks: banks.iter().map(start).collect(),
            refuse: VecDeque::new(),
            answer: VecDeque::new(),
            remote: None,
            seen: Vec::new(),
        }
    }

    /// A TPM with the banks of algorithms that this crate computes.
    pub fn with(algs: &[HashAlg]) -> Self {
        Self::new(&algs.iter().map(|alg| Bank::computed(*alg).unwrap()).collect::<Vec<_>>())
    }

    /// What the CPU does at SKINIT: _TPM_Hash_Start, the block, _TPM_Hash_End.
    pub fn drtm(&mut self, slb: &[u8]) {
        for (bank, pcrs) in &mut self.banks {
            pcrs[17..23].fill(Digest::zero(*bank));
            let digest = crate::digest_of(bank.alg, &[slb]).unwrap_or(Digest::cap(*bank));
            pcrs[17] = extend(&pcrs[17], &digest);
        }
    }

    /// The present value of a PCR.
    pub fn pcr(&self, alg: HashAlg, pcr: usize) -> Digest {
        self.banks.iter().find(|(bank, _)| bank.alg == alg).expect("a bank that exists").1[pcr]
    }

    /// Runs a command sent from `locality`.
    pub fn execute(&mut self, locality: u8, command: &[u8]) -> Vec<u8> {
        self.seen.push((locality, command.to_vec()));
        if let Some(rc) = self.refuse.pop_front() {
            return response(0x8001, rc, &[]);
        }
        if let Some(answer) = self.answer.pop_front() {
            return answer;
        }
        if let Some(remote) = &mut self.remote {
            return remote(locality, command);
        }
        assert_eq!(be32(command, 2) as usize, command.len(), "commandSize");
        match be32(command, 6) {
            0x17a => self.get_capability(command),
            0x17e => self.pcr_read(command),
            0x182 => self.pcr_extend(locality, command),
            0x13c => self.pcr_event(locality, command),
            _ => response(0x8001, RC_COMMAND_CODE, &[]),
        }
    }

    fn get_capability(&self, command: &[u8]) -> Vec<u8> {
        assert_eq!(command[..2], [0x80, 1]);
        assert_eq!((be32(command, 10), be32(command, 14)), (5, 0), "TPM_CAP_PCRS, property 0");
        // One bank that is implemented but not allocated, as swtpm reports them.
        let mut body = vec![0, 0, 0, 0, 5];
        body.extend((self.banks.len() as u32 + 1).to_be_bytes());
        body.extend([0x00, 0x27, 3, 0, 0, 0]);
        for (bank, _) in &self.banks {
            body.extend(bank.alg.0.to_be_bytes());
            body.extend([3, 0xff, 0xff, 0xff]);
        }
        response(0x8001, 0, &body)
    }

    fn pcr_read(&self, command: &[u8]) -> Vec<u8> {
        assert_eq!((be32(command, 10), command.len()), (1, 20), "one selection");
        let alg = u16::from_be_bytes([command[14], command[15]]);
        let pcr = u32::from_le_bytes([command[17], command[18], command[19], 0]).trailing_zeros();
        let mut body = vec![0, 0, 0, 9, 0, 0, 0, 1];
        body.extend(&command[14..17]);
        match self.banks.iter().find(|(bank, _)| bank.alg.0 == alg) {
            None => body.extend([0; 7]),
            Some((bank, pcrs)) => {
                body.extend(&command[17..20]);
                body.extend([0, 0, 0, 1, 0, bank.size]);
                body.extend(pcrs[pcr as usize].as_bytes());
            }
        }
        response(0x8001, 0, &body)
    }

    fn pcr_extend(&mut self, locality: u8, command: &[u8]) -> Vec<u8> {
        assert_eq!(command[..2], [0x80, 2]);
        let pcr = be32(command, 10);
        assert_eq!(command[14..27], [0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0], "empty password");
        if let Err(rc) = may_extend(pcr, locality) {
            return response(0x8001, rc, &[]);
        }
        let mut rest = &command[31..];
        for _ in 0..be32(command, 27) {
            let alg = u16::from_be_bytes([rest[0], rest[1]]);
            let (bank, pcrs) = self.banks.iter_mut().find(|(bank, _)| bank.alg.0 == alg).unwrap();
            let (digest, after) = rest[2..].split_at(bank.size.into());
            let value = &mut pcrs[pcr as usize];
            *value = extend(value, &Digest::new(bank.alg, digest).unwrap());
            rest = after;
        }
        assert!(rest.is_empty(), "bytes after the last digest");
        // Parameter size 0 and the answer to the empty password.
        response(0x8002, 0, &[0, 0, 0, 0, 0, 0, 1, 0, 0])
    }

    fn pcr_event(&mut self, locality: u8, command: &[u8]) -> Vec<u8> {
        assert_eq!(command[..2], [0x80, 2]);
        let pcr = be32(command, 10);
        assert_eq!(command[14..27], [0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0], "empty password");
        let (length, data) = (u16::from_be_bytes([command[27], command[28]]), &command[29..]);
        assert_eq!(usize::from(length), data.len());
        if let Err(rc) = may_extend(pcr, locality) {
            return response(0x8001, rc, &[]);
        }
        let mut digests = (self.banks.len() as u32).to_be_bytes().to_vec();
        for (bank, pcrs) in &mut self.banks {
            let digest = crate::digest_of(bank.alg, &[data]).unwrap_or(Digest::cap(*bank));
            let value = &mut pcrs[pcr as usize];
            *value = extend(value, &digest);
            digests.extend(bank.alg.0.to_be_bytes());
            digests.extend(digest.as_bytes());
        }
        let mut body = (digests.len() as u32).to_be_bytes().to_vec();
        body.extend(digests);
        body.extend([0, 0, 1, 0, 0]);
        response(0x8002, 0, &body)
    }
}

/// Spec: [PTP] "PCR Attributes".
fn may_extend(pcr: u32, locality: u8) -> Result<(), u32> {
    let allowed = match pcr {
        0..=16 | 23 => 0..=4,
        17 | 18 => 2..=4,
        19 => 2..=3,
        20 => 1..=3,
        21 | 22 => 2..=2,
        _ => return Err(RC_VALUE),
    };
    if allowed.contains(&locality) { Ok(()) } else { Err(RC_LOCALITY) }
}

/// For an algorithm that we cannot compute any change of the value will do.
fn extend(value: &Digest, digest: &Digest) -> Digest {
    extended(value, digest).unwrap_or_else(|| {
        let mixed: Vec<u8> =
            value.as_bytes().iter().zip(digest.as_bytes()).map(|(a, b)| a.rotate_left(1) ^ b).collect();
        Digest::new(value.alg(), &mixed).unwrap()
    })
}

fn response(tag: u16, rc: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = tag.to_be_bytes().to_vec();
    bytes.extend((body.len() as u32 + 10).to_be_bytes());
    bytes.extend(rc.to_be_bytes());
    bytes.extend(body);
    bytes
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}
