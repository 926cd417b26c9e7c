//! What becomes of a firmware call: by service, and for variables by vendor GUID and name.

use heapless::{String, Vec};
use uefi_raw::Guid;

use crate::service::{COUNT, Service};

/// Most rules about single variables.
pub const RULES_MAX: usize = 32;
/// Longest pattern of a variable's name, in characters.
pub const PATTERN_MAX: usize = 64;

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// The call runs in the sandbox.
    Sandbox,
    /// Refused until the guest's root asks to unlock, which a PCR shows before the first call gets through.
    Locked,
    /// Of SetVariable: the guest sees its write at once, firmware gets it when the machine is reset.
    Deferred,
    /// Firmware is trusted with this call: it reaches what the guest's kernel does, and its own memory.
    Native,
    /// Firmware is called between two launches: the guest waits in memory that is verified before it goes on.
    Relaunch,
    /// EFI_UNSUPPORTED, and the service's bit is clear in EFI_RT_PROPERTIES_TABLE. For single variables:
    /// EFI_SECURITY_VIOLATION.
    Deny,
}

impl Policy {
    /// The word in the configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sandbox => "sandbox",
            Self::Locked => "locked",
            Self::Deferred => "deferred",
            Self::Native => "native",
            Self::Relaunch => "relaunch",
            Self::Deny => "deny",
        }
    }
}

/// A policy for the variables of one vendor, or of any, whose names match a pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// GetVariable or SetVariable.
    pub service: Service,
    /// The vendor; `None` is any.
    pub guid: Option<Guid>,
    /// Name: `*` stands for any characters, `?` for one.
    pub pattern: String<PATTERN_MAX>,
    /// What becomes of the call.
    pub policy: Policy,
}

impl Rule {
    /// Whether the rule is about a call. `name` is UTF-16, in bytes, with its terminating zero.
    fn covers(&self, service: Service, guid: &[u8; 16], name: &[u8]) -> bool {
        self.service == service
            && self.guid.is_none_or(|g| g.to_bytes() == *guid)
            && matches(self.pattern.as_bytes(), name)
    }
}

/// All policies in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policies {
    services: [Policy; COUNT],
    rules: Vec<Rule, RULES_MAX>,
}

impl Default for Policies {
    fn default() -> Self {
        let services = Service::ALL.map(|s| if s.supported() { Policy::Sandbox } else { Policy::Deny });
        Self { services, rules: Vec::new() }
    }
}

impl Policies {
    /// What becomes of calls of `service` that no rule is about.
    pub fn service(&self, service: Service) -> Policy {
        self.services.get(service.index()).copied().unwrap_or(Policy::Deny)
    }

    /// Sets the policy of a service.
    pub fn set(&mut self, service: Service, policy: Policy) {
        if let Some(slot) = self.services.get_mut(service.index()) {
            *slot = policy;
        }
    }

    /// Adds a rule, behind those there are; false when there is no room.
    pub fn add(&mut self, rule: Rule) -> bool {
        self.rules.push(rule).is_ok()
    }

    /// The rules, in their order: the first that is about a call decides.
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// What becomes of a call for one variable. A service that is denied is denied for every variable.
    pub fn variable(&self, service: Service, guid: &[u8; 16], name: &[u8]) -> Policy {
        let whole = self.service(service);
        if whole == Policy::Deny {
            return whole;
        }
        self.rules.iter().find(|rule| rule.covers(service, guid, name)).map_or(whole, |rule| rule.policy)
    }

    /// Whether `policy` is in force for any call.
    pub fn any(&self, policy: Policy) -> bool {
        let rules = self.rules.iter().map(|rule| rule.policy);
        self.services.iter().copied().chain(rules).any(|p| p == policy)
    }

    /// The mask for EFI_RT_PROPERTIES_TABLE: a bit for each service that is not denied.
    pub fn rt_properties(&self) -> u32 {
        let offered = Service::ALL.into_iter().filter(|s| self.service(*s) != Policy::Deny);
        offered.fold(0, |mask, s| mask | s.rt_properties_bit())
    }
}

/// Whether a name, UTF-16 in bytes up to its zero character, matches a pattern of ASCII.
///
/// On a mismatch only the latest `*` takes one more character: that is enough, and the work is at most the product of
/// both lengths.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    let name =
        || name.chunks_exact(2).map(|c| c.try_into().map_or(0, u16::from_le_bytes)).take_while(|c| *c != 0);
    let (mut pattern, mut rest) = (pattern, name());
    let mut retry = None;
    loop {
        if let Some((b'*', after)) = pattern.split_first() {
            pattern = after;
            retry = Some((after, rest.clone()));
            continue;
        }
        match (pattern.split_first(), rest.next()) {
            (None, None) => return true,
            (Some((p, after)), Some(c)) if *p == b'?' || u16::from(*p) == c => pattern = after,
            // The name is at its end: what is left of the pattern matches nothing.
            (_, None) => return false,
            (_, Some(_)) => {
                let Some((after, from)) = &mut retry else { return false };
                if from.next().is_none() {
                    return false;
                }
                pattern = after;
                rest = from.clone();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use uefi_raw::guid;

    const GLOBAL: Guid = guid!("8be4df61-93ca-11d2-aa0d-00e098032b8c");

    fn wide(name: &str) -> std::vec::Vec<u8> {
        name.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect()
    }

    fn rule(service: Service, guid: Option<Guid>, pattern: &str, policy: Policy) -> Rule {
        Rule { service, guid, pattern: pattern.try_into().unwrap(), policy }
    }

    #[test]
    fn the_first_rule_about_a_call_decides() {
        let mut p = Policies::default();
        assert!(p.add(rule(Service::SetVariable, Some(GLOBAL), "BootOrder", Policy::Sandbox)));
        assert!(p.add(rule(Service::SetVariable, None, "Boot*", Policy::Locked)));
        let set = |guid: Guid, name: &str| p.variable(Service::SetVariable, &guid.to_bytes(), &wide(name));
        assert_eq!(set(GLOBAL, "BootOrder"), Policy::Sandbox);
        assert_eq!(set(GLOBAL, "Boot0001"), Policy::Locked);
        assert_eq!(set(Guid::ZERO, "BootOrder"), Policy::Locked);
        assert_eq!(set(Guid::ZERO, "Other"), Policy::Sandbox);
        assert_eq!(p.variable(Service::GetVariable, &GLOBAL.to_bytes(), &wide("Boot0001")), Policy::Sandbox);
    }

    #[test]
    fn no_rule_opens_a_denied_service() {
        let mut p = Policies::default();
        p.set(Service::SetVariable, Policy::Deny);
        assert!(p.add(rule(Service::SetVariable, None, "*", Policy::Sandbox)));
        assert_eq!(p.variable(Service::SetVariable, &[0; 16], &wide("A")), Policy::Deny);
        assert_eq!(p.rt_properties() & Service::SetVariable.rt_properties_bit(), 0);
    }

    #[test]
    fn rules_are_limited() {
        let mut p = Policies::default();
        let one = rule(Service::GetVariable, None, "*", Policy::Deny);
        assert!((0..RULES_MAX).all(|_| p.add(one.clone())));
        assert!(!p.add(one));
    }

    /// The definition, by recursion.
    fn defined(pattern: &[u8], name: &[u16]) -> bool {
        match (pattern, name) {
            ([], []) => true,
            ([b'*', p @ ..], n) => defined(p, n) || (!n.is_empty() && defined(pattern, &n[1..])),
            ([b'?', p @ ..], [_, n @ ..]) => defined(p, n),
            ([c, p @ ..], [d, n @ ..]) => u16::from(*c) == *d && defined(p, n),
            _ => false,
        }
    }

    proptest! {
        #[test]
        fn patterns_match_as_defined(pattern in "[ab*?]{0,8}", name in "[abé]{0,10}") {
            let units: std::vec::Vec<u16> = name.encode_utf16().collect();
            prop_assert_eq!(matches(pattern.as_bytes(), &wide(&name)), defined(pattern.as_bytes(), &units));
        }
    }
}
