//! What a CPU's exits tell of the kernel that runs there.
//!
//! | Linux | exits | it is |
//! |---|---|---|
//! | begins, on any CPU | CPUID at low addresses; at high ones, the APIC of an AP off until it is set up | nothing |
//! | runs | CPUID at high addresses, APIC on | nothing |
//! | takes a CPU off line (`native_play_dead`), or stops it for kexec (`stop_this_cpu`) | WBINVD, or CPUID to know whether that is needed: high addresses, APIC off | [`Sign::Off`] |
//! | is replaced by kexec | CPUID at low addresses | [`Sign::Replaced`] |

/// A CPU's kernel, as far as it has shown.
#[derive(Default)]
pub struct Signs {
    /// It ran at high addresses, with the APIC on.
    has_kernel: bool,
}

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sign {
    /// It begins, or goes on.
    None,
    /// It has turned this CPU's APIC off.
    Off,
    /// Another begins.
    Replaced,
}

impl Signs {
    /// CPUID or WBINVD was executed at CPL 0, at `rip`.
    pub fn of(&mut self, rip: u64, apic_on: bool) -> Sign {
        let (had, high) = (self.has_kernel, rip >> 63 != 0);
        self.has_kernel = high && (had || apic_on);
        match (had, high) {
            (true, false) => Sign::Replaced,
            (true, true) if !apic_on => Sign::Off,
            _ => Sign::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOW: u64 = 0x9_d080;
    const HIGH: u64 = 0xffff_ffff_8100_0000;

    fn all(exits: &[(u64, bool)]) -> Vec<Sign> {
        let mut signs = Signs::default();
        exits.iter().map(|(rip, apic_on)| signs.of(*rip, *apic_on)).collect()
    }

    #[test]
    fn an_ap_that_linux_starts_is_not_one_that_it_stops() {
        let exits = [(LOW, false), (HIGH, false), (HIGH, true), (HIGH, true)];
        assert_eq!(all(&exits), [Sign::None; 4]);
    }

    #[test]
    fn an_ap_shows_when_it_is_stopped() {
        assert_eq!(all(&[(HIGH, true), (HIGH, false), (HIGH, false)]), [Sign::None, Sign::Off, Sign::Off]);
    }

    #[test]
    fn a_kernel_that_another_starts_shows_once() {
        let kexec = [
            (HIGH, true),
            (HIGH, false),
            (LOW, false),
            (LOW, false),
            (HIGH, false),
            (HIGH, true),
            (LOW, true),
        ];
        let [none, off, replaced] = [Sign::None, Sign::Off, Sign::Replaced];
        assert_eq!(all(&kexec), [none, off, replaced, none, none, none, replaced]);
    }
}
