//! SHA-256's compression function for images, in two ways: by the CPU's SHA instructions, and without them.
//!
//! The `sha2` crate has both, too, but leaves the instructions out on bare-metal targets, where the compiler must not
//! touch XMM registers. Here they are used by assembly alone, which saves and restores each register it
//! changes: in an MLE they hold the guest's values. Without them that crate has the choice of some 80 instructions a byte, and
//! of 58 in 10 KiB, a third of an SLB; ours takes 46, in 1.5 KiB. The tests compare both ways with that crate.
#![cfg_attr(not(test), no_std)]
// Tests may overflow: that is how they fail.
#![cfg_attr(test, allow(clippy::arithmetic_side_effects))]
// UNSAFETY: the instructions themselves; `Sha256Blocks` is given out only where the CPU has them.
#![expect(unsafe_code, reason = "the SHA instructions are reached by assembly")]

use core::arch::naked_asm;
use core::arch::x86_64::{__cpuid, __cpuid_count};

/// A SHA-256 compression function over whole blocks.
pub type Sha256Blocks = fn(&mut [u32; 8], &[[u8; 64]]);

/// The compression function for every CPU.
///
/// Spec: \[FIPS180\] "SHA-256 Hash Computation".
pub fn software(state: &mut [u32; 8], blocks: &[[u8; 64]]) {
    let mut schedule = [0; 64];
    for block in blocks {
        fill(&mut schedule, block);
        take(state, &schedule);
    }
}

/// Fills a block's message schedule, four words at a time: the loop itself is five instructions.
fn fill(schedule: &mut [u32; 64], block: &[u8; 64]) {
    for (word, bytes) in schedule.iter_mut().zip(block.as_chunks().0) {
        *word = u32::from_be_bytes(*bytes);
    }
    let mut rest = schedule.as_mut_slice();
    while let [w0, w1, w2, w3, w4, _, _, _, _, w9, w10, w11, w12, _, w14, w15, w16, w17, w18, w19, ..] = rest
    {
        *w16 = next(*w0, *w1, *w9, *w14);
        *w17 = next(*w1, *w2, *w10, *w15);
        *w18 = next(*w2, *w3, *w11, *w16);
        *w19 = next(*w3, *w4, *w12, *w17);
        rest = rest.get_mut(4..).unwrap_or_default();
    }
}

/// The word of sixteen rounds after `w0`. Nested, its rotations need no copies of a word.
#[inline(always)]
fn next(w0: u32, w1: u32, w9: u32, w14: u32) -> u32 {
    let s0 = (w1.rotate_right(11) ^ w1).rotate_right(7) ^ w1 >> 3;
    let s1 = (w14.rotate_right(2) ^ w14).rotate_right(17) ^ w14 >> 10;
    w0.wrapping_add(s0).wrapping_add(w9).wrapping_add(s1)
}

/// Takes a block into the state by its message schedule: eight rounds at a time, after which each variable has its place again.
fn take(state: &mut [u32; 8], schedule: &[u32; 64]) {
    let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = *state;
    // b ^ c of a round is a ^ b of the one before.
    let mut bc = b ^ c;
    // The standard's variables change names instead of places. The standard's h of the next round, its `g`, is left alone; where
    // its `a` belongs is what was `h`.
    macro_rules! round {
        ($a:ident $b:ident $c:ident $d:ident $e:ident $f:ident $g:ident $h:ident, $word:expr, $constant:expr) => {
            let sum1 = (($e.rotate_right(14) ^ $e).rotate_right(5) ^ $e).rotate_right(6);
            let choice = ($f ^ $g) & $e ^ $g;
            $h = $h.wrapping_add($word).wrapping_add($constant).wrapping_add(choice).wrapping_add(sum1);
            $d = $d.wrapping_add($h);
            let sum0 = (($a.rotate_right(9) ^ $a).rotate_right(11) ^ $a).rotate_right(2);
            let ab = $a ^ $b;
            let majority = bc & ab ^ $b;
            bc = ab;
            $h = $h.wrapping_add(sum0).wrapping_add(majority);
        };
    }
    for (w, k) in schedule.as_chunks::<8>().0.iter().zip(K.as_chunks::<8>().0) {
        round!(a b c d e f g h, w[0], k[0]);
        round!(h a b c d e f g, w[1], k[1]);
        round!(g h a b c d e f, w[2], k[2]);
        round!(f g h a b c d e, w[3], k[3]);
        round!(e f g h a b c d, w[4], k[4]);
        round!(d e f g h a b c, w[5], k[5]);
        round!(c d e f g h a b, w[6], k[6]);
        round!(b c d e f g h a, w[7], k[7]);
    }
    for (to, word) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
        *to = to.wrapping_add(word);
    }
}

/// The compression function by the CPU's SHA instructions, if it has them and what else that takes.
///
/// # Safety
/// Whenever and on whatever CPU the function runs, SSE instructions must be usable: CR0.EM and CR0.TS are
/// clear and CR4.OSFXSR is set. All CPUs have the same instructions.
///
/// Spec: \[SDM2\] "CPUID": leaf 7 EBX bit 29 (SHA), leaf 1 ECX bits 9 (SSSE3) and 19 (SSE4.1).
pub unsafe fn instructions() -> Option<Sha256Blocks> {
    let has_leaf_7 = __cpuid(0).eax >= 7;
    let has = has_leaf_7
        && __cpuid_count(7, 0).ebx & 1 << 29 != 0
        && __cpuid(1).ecx & (1 << 9 | 1 << 19) == 1 << 9 | 1 << 19;
    has.then_some(compress as Sha256Blocks)
}

/// The round constants, in order; the instructions take four at a time.
///
/// Spec: \[FIPS180\] "SHA-224 and SHA-256 Constants".
#[rustfmt::skip]
static K: [u32; 64] = [
    0x428a_2f98, 0x7137_4491, 0xb5c0_fbcf, 0xe9b5_dba5, 0x3956_c25b, 0x59f1_11f1, 0x923f_82a4, 0xab1c_5ed5,
    0xd807_aa98, 0x1283_5b01, 0x2431_85be, 0x550c_7dc3, 0x72be_5d74, 0x80de_b1fe, 0x9bdc_06a7, 0xc19b_f174,
    0xe49b_69c1, 0xefbe_4786, 0x0fc1_9dc6, 0x240c_a1cc, 0x2de9_2c6f, 0x4a74_84aa, 0x5cb0_a9dc, 0x76f9_88da,
    0x983e_5152, 0xa831_c66d, 0xb003_27c8, 0xbf59_7fc7, 0xc6e0_0bf3, 0xd5a7_9147, 0x06ca_6351, 0x1429_2967,
    0x27b7_0a85, 0x2e1b_2138, 0x4d2c_6dfc, 0x5338_0d13, 0x650a_7354, 0x766a_0abb, 0x81c2_c92e, 0x9272_2c85,
    0xa2bf_e8a1, 0xa81a_664b, 0xc24b_8b70, 0xc76c_51a3, 0xd192_e819, 0xd699_0624, 0xf40e_3585, 0x106a_a070,
    0x19a4_c116, 0x1e37_6c08, 0x2748_774c, 0x34b0_bcb5, 0x391c_0cb3, 0x4ed8_aa4a, 0x5b9c_ca4f, 0x682e_6ff3,
    0x748f_82ee, 0x78a5_636f, 0x84c8_7814, 0x8cc7_0208, 0x90be_fffa, 0xa450_6ceb, 0xbef9_a3f7, 0xc671_78f2,
];

/// PSHUFB's order of bytes that turns four big-endian words into little-endian ones.
static SWAP_WORDS: [u8; 16] = [3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12];

/// XMM registers that the assembly changes.
const SAVED: usize = 11;

fn compress(state: &mut [u32; 8], blocks: &[[u8; 64]]) {
    if blocks.is_empty() {
        return;
    }
    let [a, b, c, d, e, f, g, h] = *state;
    let mut words = [f, e, b, a, h, g, d, c];
    let mut saved = [[0_u8; 16]; SAVED];
    // SAFETY: the pointers are those of three living, distinct objects, the count is that of `blocks` and
    // not zero. `instructions` gave this function out after a look at CPUID, and its caller promised that
    // SSE is usable.
    unsafe { compress_words(&raw mut words, blocks.as_ptr(), blocks.len(), &raw mut saved) }
    let [f, e, b, a, h, g, d, c] = words;
    *state = [a, b, c, d, e, f, g, h];
}

/// Takes `count` blocks into `words`, the state in the order F E B A H G D C. XMM registers are kept in
/// `saved` meanwhile and come back unchanged.
///
/// | register | holds |
/// |---|---|
/// | rdi, rsi, rdx, rcx | the arguments: `words`, `data` and `count` (counting on and down), `saved` |
/// | rax, r8 | offset of the next four constants; [`K`] |
/// | xmm0 | words plus constants of the next rounds, where SHA256RNDS2 wants them |
/// | xmm1, xmm2 | state words A B E F and C D G H, the first in the highest place |
/// | xmm3 to xmm6 | the next sixteen words of the message schedule |
/// | xmm7 | scratch |
/// | xmm8 | [`SWAP_WORDS`] |
/// | xmm9, xmm10 | the state before the block |
///
/// # Safety
/// `data` has `count` blocks, at least one; the CPU has SSSE3, SSE4.1 and SHA instructions, enabled.
///
/// Spec: \[SDM2\] "SHA256RNDS2", "SHA256MSG1", "SHA256MSG2".
#[unsafe(naked)]
unsafe extern "sysv64" fn compress_words(
    words: *mut [u32; 8],
    data: *const [u8; 64],
    count: usize,
    saved: *mut [[u8; 16]; SAVED],
) {
    naked_asm!(
        "movdqu [rcx], xmm0",
        "movdqu [rcx + 16], xmm1",
        "movdqu [rcx + 32], xmm2",
        "movdqu [rcx + 48], xmm3",
        "movdqu [rcx + 64], xmm4",
        "movdqu [rcx + 80], xmm5",
        "movdqu [rcx + 96], xmm6",
        "movdqu [rcx + 112], xmm7",
        "movdqu [rcx + 128], xmm8",
        "movdqu [rcx + 144], xmm9",
        "movdqu [rcx + 160], xmm10",
        "movdqu xmm8, [rip + {swap}]",
        "lea r8, [rip + {k}]",
        "movdqu xmm1, [rdi]",
        "movdqu xmm2, [rdi + 16]",
        // A block.
        "2:",
        "movdqa xmm9, xmm1",
        "movdqa xmm10, xmm2",
        "movdqu xmm3, [rsi]",
        "movdqu xmm4, [rsi + 16]",
        "movdqu xmm5, [rsi + 32]",
        "movdqu xmm6, [rsi + 48]",
        "pshufb xmm3, xmm8",
        "pshufb xmm4, xmm8",
        "pshufb xmm5, xmm8",
        "pshufb xmm6, xmm8",
        "xor eax, eax",
        // Four rounds; after two of them the halves of the state have changed places, after four not.
        "3:",
        "movdqu xmm0, [r8 + rax]",
        "paddd xmm0, xmm3",
        "sha256rnds2 xmm2, xmm1, xmm0",
        "pshufd xmm0, xmm0, 0x0e",
        "sha256rnds2 xmm1, xmm2, xmm0",
        // The words of sixteen rounds later; those after the last round are of no use and no harm.
        "sha256msg1 xmm3, xmm4",
        "movdqa xmm7, xmm6",
        "palignr xmm7, xmm5, 4",
        "paddd xmm7, xmm3",
        "sha256msg2 xmm7, xmm6",
        "movdqa xmm3, xmm4",
        "movdqa xmm4, xmm5",
        "movdqa xmm5, xmm6",
        "movdqa xmm6, xmm7",
        "add eax, 16",
        "cmp eax, 256",
        "jb 3b",
        "paddd xmm1, xmm9",
        "paddd xmm2, xmm10",
        "add rsi, 64",
        "dec rdx",
        "jnz 2b",
        "movdqu [rdi], xmm1",
        "movdqu [rdi + 16], xmm2",
        "movdqu xmm0, [rcx]",
        "movdqu xmm1, [rcx + 16]",
        "movdqu xmm2, [rcx + 32]",
        "movdqu xmm3, [rcx + 48]",
        "movdqu xmm4, [rcx + 64]",
        "movdqu xmm5, [rcx + 80]",
        "movdqu xmm6, [rcx + 96]",
        "movdqu xmm7, [rcx + 112]",
        "movdqu xmm8, [rcx + 128]",
        "movdqu xmm9, [rcx + 144]",
        "movdqu xmm10, [rcx + 160]",
        "ret",
        swap = sym SWAP_WORDS,
        k = sym K,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::arch::asm;
    use proptest::prelude::*;

    /// The function under test; without SHA instructions there is nothing to test.
    fn ours() -> Option<Sha256Blocks> {
        // SAFETY: an operating system lets its programs use SSE.
        let ours = unsafe { instructions() };
        if ours.is_none() {
            eprintln!("this CPU has no SHA instructions: not run");
        }
        ours
    }

    #[test]
    fn detection_agrees_with_the_standard_library() {
        let there = is_x86_feature_detected!("sha") && is_x86_feature_detected!("sse4.1");
        assert_eq!(ours().is_some(), there);
    }

    #[test]
    fn xmm_registers_come_back_unchanged() {
        if ours().is_none() {
            return;
        }
        let (mut words, block) = ([1_u32; 8], [7_u8; 64]);
        let mut saved = [[0_u8; 16]; SAVED];
        let before: [[u8; 16]; SAVED] =
            core::array::from_fn(|n| core::array::from_fn(|m| (n * 16 + m) as u8));
        let mut after = [[0_u8; 16]; SAVED];
        // SAFETY: `compress_words` gets what it asks for and keeps r12 and r13, as its calling convention
        // says; eleven times 16 bytes are read from `before` and written to `after`. The red zone is not
        // in use: the block may push.
        unsafe {
            asm!(
                "movdqu xmm0, [r12]",
                "movdqu xmm1, [r12 + 16]",
                "movdqu xmm2, [r12 + 32]",
                "movdqu xmm3, [r12 + 48]",
                "movdqu xmm4, [r12 + 64]",
                "movdqu xmm5, [r12 + 80]",
                "movdqu xmm6, [r12 + 96]",
                "movdqu xmm7, [r12 + 112]",
                "movdqu xmm8, [r12 + 128]",
                "movdqu xmm9, [r12 + 144]",
                "movdqu xmm10, [r12 + 160]",
                "call {function}",
                "movdqu [r13], xmm0",
                "movdqu [r13 + 16], xmm1",
                "movdqu [r13 + 32], xmm2",
                "movdqu [r13 + 48], xmm3",
                "movdqu [r13 + 64], xmm4",
                "movdqu [r13 + 80], xmm5",
                "movdqu [r13 + 96], xmm6",
                "movdqu [r13 + 112], xmm7",
                "movdqu [r13 + 128], xmm8",
                "movdqu [r13 + 144], xmm9",
                "movdqu [r13 + 160], xmm10",
                function = sym compress_words,
                in("r12") before.as_ptr(),
                in("r13") after.as_mut_ptr(),
                inout("rdi") &raw mut words => _,
                inout("rsi") &raw const block => _,
                inout("rdx") 1_usize => _,
                inout("rcx") &raw mut saved => _,
                clobber_abi("sysv64"),
            );
        }
        assert_eq!(after, before);
        assert_ne!(words, [1; 8]);
    }

    #[test]
    fn no_block_changes_nothing() {
        let Some(ours) = ours() else { return };
        let mut state = [3; 8];
        ours(&mut state, &[]);
        assert_eq!(state, [3; 8]);
    }

    proptest! {
        #[test]
        fn both_ways_give_the_state_that_the_crate_gives(
            start: [u32; 8],
            bytes in prop::collection::vec(any::<[u8; 64]>(), 0..5),
        ) {
            let mut wanted = start;
            sha2::block_api::compress256(&mut wanted, &bytes);
            for ours in [Some(software as Sha256Blocks), ours()].into_iter().flatten() {
                let mut state = start;
                ours(&mut state, &bytes);
                prop_assert_eq!(state, wanted);
            }
        }
    }
}
