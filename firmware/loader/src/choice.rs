//! Which of several entries is booted: the one `loader.conf` names, else the newest by name.

use alloc::string::String;
use core::cmp::Ordering;

/// The `default` pattern of a `loader.conf`, if it has one; the last one counts.
pub fn default_pattern(loader_conf: &str) -> Option<&str> {
    let settings = loader_conf.lines().rev();
    settings
        .filter_map(|line| line.trim().split_once(char::is_whitespace))
        .find(|(key, _)| *key == "default")
        .map(|(_, value)| value.trim())
}

/// Whether `name`, a file name of an entry, is named by `pattern`: `*` is any text, `?` one character, and
/// the ending `.conf` may be left out. Case does not count, as on the file system.
pub fn names(pattern: &str, name: &str) -> bool {
    let stem = |s: &str| {
        let cut = s.len().saturating_sub(5);
        let conf = s.get(cut..).is_some_and(|end| end.eq_ignore_ascii_case(".conf"));
        String::from(if conf { s.get(..cut).unwrap_or(s) } else { s })
    };
    glob(stem(pattern).as_bytes(), stem(name).as_bytes())
}

/// Matches with one step of backtracking: to the last `*` seen, which is as good as to any before it.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (pattern, text);
    let mut retry: Option<(&[u8], &[u8])> = None;
    loop {
        match (p.split_first(), t.split_first()) {
            (Some((b'*', rest)), _) => {
                retry = Some((rest, t));
                p = rest;
                continue;
            }
            (None, None) => return true,
            (Some((a, p_rest)), Some((b, t_rest))) if *a == b'?' || a.eq_ignore_ascii_case(b) => {
                (p, t) = (p_rest, t_rest);
                continue;
            }
            _ => {}
        }
        let Some((after_star, from)) = retry else { return false };
        let Some((_, shorter)) = from.split_first() else { return false };
        retry = Some((after_star, shorter));
        (p, t) = (after_star, shorter);
    }
}

/// A piece of a version; the order of the variants is the order of versions that differ first in such pieces.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Part<'a> {
    /// `~`: a version before the one without it.
    Before,
    End,
    Dash,
    Caret,
    Dot,
    Word(&'a [u8]),
    /// A number without leading zeros: the longer is the greater.
    Number(usize, &'a [u8]),
}

/// Cuts the next part off `rest`; characters that are in no part are passed over.
fn next_part<'a>(rest: &mut &'a [u8]) -> Part<'a> {
    while let [first, after @ ..] = *rest {
        let run = |member: fn(&u8) -> bool| rest.iter().position(|c| !member(c)).unwrap_or(rest.len());
        let (part, len) = match first {
            b'~' => (Part::Before, 1),
            b'-' => (Part::Dash, 1),
            b'^' => (Part::Caret, 1),
            b'.' => (Part::Dot, 1),
            b'0'..=b'9' => {
                let len = run(u8::is_ascii_digit);
                let digits = rest.get(..len).unwrap_or_default();
                let zeros = digits.iter().take_while(|&&c| c == b'0').count();
                (Part::Number(len.saturating_sub(zeros), digits.get(zeros..).unwrap_or_default()), len)
            }
            c if c.is_ascii_alphabetic() => {
                let len = run(u8::is_ascii_alphabetic);
                (Part::Word(rest.get(..len).unwrap_or_default()), len)
            }
            _ => {
                *rest = after;
                continue;
            }
        };
        *rest = rest.get(len..).unwrap_or_default();
        return part;
    }
    Part::End
}

/// Compares two file names as versions: digits count as numbers, `~` sorts before everything.
///
/// Spec: UAPI.10 "Version Format Specification", "Algorithm".
pub fn version_cmp(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    loop {
        let (x, y) = (next_part(&mut a), next_part(&mut b));
        let order = x.cmp(&y);
        if order != Ordering::Equal || x == Part::End {
            return order;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn versions_sort_as_people_count() {
        let sorted = [
            "",
            "~1",
            "linux-6.1.0~rc1",
            "linux-6.1.0",
            "linux-6.1.0-2",
            "linux-6.1.0-10",
            "linux-6.1.0^1",
            "linux-6.1.0.1",
            "linux-6.9",
            "linux-6.10",
        ];
        // "~1" sorts before the end of the text, the rest is in order.
        assert_eq!(version_cmp(sorted[1], sorted[0]), Ordering::Less);
        for pair in sorted[1..].windows(2) {
            assert_eq!(version_cmp(pair[0], pair[1]), Ordering::Less, "{pair:?}");
            assert_eq!(version_cmp(pair[1], pair[0]), Ordering::Greater, "{pair:?}");
        }
        assert_eq!(version_cmp("a007", "a7"), Ordering::Equal);
        assert_eq!(version_cmp("a", "B"), Ordering::Greater);
        assert_eq!(version_cmp("1.a", "1.2"), Ordering::Less);
    }

    #[test]
    fn default_names_an_entry_or_a_family() {
        assert_eq!(
            default_pattern("timeout 3\n# default x\ndefault\told\n default cordon-* \n"),
            Some("cordon-*")
        );
        assert_eq!(default_pattern("timeout 3\ndefault"), None);
        for (pattern, name, want) in [
            ("cordon.conf", "Cordon.conf", true),
            ("cordon", "cordon.conf", true),
            ("cordon-*", "cordon-6.1.conf", true),
            ("*6.?", "cordon-6.1.conf", true),
            ("*a*b", "xaxaxb.conf", true),
            ("*a*b", "xaxaxc.conf", false),
            ("cordon", "cordon2.conf", false),
            ("*", ".conf", true),
            ("", "x.conf", false),
        ] {
            assert_eq!(names(pattern, name), want, "{pattern} {name}");
        }
    }

    proptest! {
        #[test]
        fn comparing_is_an_order(a in "[a1.~-]{0,6}", b in "[a1.~-]{0,6}", c in "[a1.~-]{0,6}") {
            prop_assert_eq!(version_cmp(&a, &b), version_cmp(&b, &a).reverse());
            if version_cmp(&a, &b).is_le() && version_cmp(&b, &c).is_le() {
                prop_assert!(version_cmp(&a, &c).is_le());
            }
        }

        #[test]
        fn any_text_ends(a in any::<String>(), b in any::<String>()) {
            let _ = version_cmp(&a, &b);
            let _ = names(&a, &b);
            let ends = names(&["*", &b].concat(), &[&a, &b, ".conf"].concat());
            prop_assert!(ends || b.contains(['*', '?']) || b.to_ascii_lowercase().ends_with(".conf"));
        }
    }
}
