//! Writes of variables that wait until the machine is reset.
//!
//! The guest sees its own writes at once: an overlay holds, for each variable that it wrote, what the variable is to be.
//! Firmware is told when the guest is at its end, of the last state of each variable alone. The overlay follows the
//! specification's rules for SetVariable, so that what it takes is what firmware would take.
//!
//! Spec: \[UEFI\] "Variable Services", SetVariable().

use uefi_raw::Status;
use zerocopy::FromZeros;

use crate::call::{DATA_MAX, NAME_MAX};

/// Most variables that wait.
pub const ENTRIES_MAX: usize = 64;
/// Bytes for the names and contents of all of them.
pub const ARENA: usize = 128 * 1024;
const _: () = assert!(ARENA >= NAME_MAX + DATA_MAX);

/// NON_VOLATILE, BOOTSERVICE_ACCESS, RUNTIME_ACCESS: what a variable must have to be made at run time.
const STORED: u32 = 0x7;
/// BOOTSERVICE_ACCESS, RUNTIME_ACCESS.
const ACCESS: u32 = 0x6;
/// APPEND_WRITE.
const APPEND: u32 = 0x40;
/// AUTHENTICATED_WRITE_ACCESS, TIME_BASED and ENHANCED.
const AUTHENTICATED: u32 = 0x10 | 0x20 | 0x80;

/// A variable: vendor GUID and terminated UTF-16 name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key<'a> {
    /// The vendor.
    pub guid: &'a [u8; 16],
    /// The name, in bytes, with its terminating zero.
    pub name: &'a [u8],
}

impl<'a> Key<'a> {
    /// The variable of a call, whose name may be followed by other bytes. `None` for a name without an end.
    pub fn new((guid, name): (&'a [u8; 16], &'a [u8])) -> Option<Self> {
        let end = name.chunks_exact(2).position(|c| c == [0, 0])?;
        Some(Self { guid, name: name.get(..end.checked_mul(2)?.checked_add(2)?)? })
    }
}

/// What firmware has of a variable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base<'a> {
    /// Nothing that can be seen at run time.
    Absent,
    /// The variable.
    Present {
        /// Its attributes.
        attributes: u32,
        /// Its content.
        data: &'a [u8],
    },
}

/// What a variable is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted<'a> {
    /// Gone.
    Deleted,
    /// This. The attributes are those of any variable here: non-volatile, accessible at boot and run time.
    Content(&'a [u8]),
}

impl Wanted<'_> {
    /// Attributes for SetVariable.
    pub const ATTRIBUTES: u32 = STORED;
}

#[derive(Clone, Copy, FromZeros)]
#[repr(C)]
struct Entry {
    guid: [u8; 16],
    name_len: u32,
    data_len: u32,
    /// 1 when the variable is to be deleted.
    deleted: u8,
    /// 1 when firmware has it.
    in_store: u8,
    reserved: [u8; 6],
}

impl Entry {
    fn len(&self) -> usize {
        (self.name_len as usize).saturating_add(self.data_len as usize)
    }
}

/// The variables that wait, the one written last at the end. All zeros is an empty one.
#[derive(FromZeros)]
#[repr(C)]
pub struct Overlay {
    count: u64,
    entries: [Entry; ENTRIES_MAX],
    /// Name and content of each entry, in the entries' order.
    arena: [u8; ARENA],
}

impl Overlay {
    fn live(&self) -> &[Entry] {
        usize::try_from(self.count).ok().and_then(|n| self.entries.get(..n)).unwrap_or_default()
    }

    /// Each entry with its name and content.
    fn all(&self) -> impl Iterator<Item = (&Entry, &[u8], &[u8])> {
        let mut at = 0usize;
        self.live().iter().map(move |entry| {
            let bytes = self.arena.get(at..at.saturating_add(entry.len())).unwrap_or_default();
            at = at.saturating_add(entry.len());
            let (name, data) = bytes.split_at_checked(entry.name_len as usize).unwrap_or_default();
            (entry, name, data)
        })
    }

    fn used(&self) -> usize {
        self.live().iter().map(Entry::len).fold(0, usize::saturating_add)
    }

    /// How many variables wait.
    pub fn count(&self) -> usize {
        self.live().len()
    }

    /// Forgets all of them: they are carried out.
    pub fn clear(&mut self) {
        self.count = 0;
    }

    /// What `key` is to be, if it waits.
    pub fn get(&self, key: Key<'_>) -> Option<Wanted<'_>> {
        let (entry, _, data) =
            self.all().find(|(entry, name, _)| entry.guid == *key.guid && *name == key.name)?;
        Some(if entry.deleted != 0 { Wanted::Deleted } else { Wanted::Content(data) })
    }

    /// The variable at `index`, and what it is to be.
    pub fn at(&self, index: usize) -> Option<(Key<'_>, Wanted<'_>)> {
        let (entry, name, data) = self.all().nth(index)?;
        let wanted = if entry.deleted != 0 { Wanted::Deleted } else { Wanted::Content(data) };
        Some((Key { guid: &entry.guid, name }, wanted))
    }

    /// Those that firmware does not know of: the one after `key`, or the first. `None` also when `key` is not one.
    pub fn next_new(&self, key: Option<Key<'_>>) -> Option<Key<'_>> {
        let mut new = self
            .all()
            .filter(|(entry, ..)| entry.in_store == 0 && entry.deleted == 0)
            .map(|(entry, name, _)| Key { guid: &entry.guid, name });
        match key {
            None => new.next(),
            Some(key) => {
                new.by_ref().find(|k| *k == key)?;
                new.next()
            }
        }
    }

    /// Whether `key` is one that firmware does not know of.
    pub fn is_new(&self, key: Key<'_>) -> bool {
        self.all().any(|(entry, name, _)| entry.in_store == 0 && entry.guid == *key.guid && name == key.name)
    }

    /// Takes a write. `base` is what firmware has; it does not count for a variable that waits already.
    pub fn set(&mut self, key: Key<'_>, attributes: u32, data: &[u8], base: Base<'_>) -> Status {
        let index = self.all().position(|(entry, name, _)| entry.guid == *key.guid && name == key.name);
        let waiting = index.and_then(|i| self.live().get(i)).copied();
        // Attributes and size of what the guest sees, and whether firmware has it.
        let (old, in_store) = match (waiting, base) {
            (Some(entry), _) => {
                ((entry.deleted == 0).then_some((STORED, entry.data_len as usize)), entry.in_store != 0)
            }
            (None, Base::Present { attributes, data }) => (Some((attributes, data.len())), true),
            (None, Base::Absent) => (None, false),
        };
        let append = attributes & APPEND != 0;
        let attributes = attributes & !APPEND;
        if key.name.len() <= 2 {
            return Status::INVALID_PARAMETER;
        }
        // Only firmware can check a signature, and it does not run now.
        if (attributes | old.map_or(0, |(a, _)| a)) & AUTHENTICATED != 0 {
            return Status::SECURITY_VIOLATION;
        }
        if !append && (data.is_empty() || attributes & ACCESS == 0) {
            return match old {
                None => Status::NOT_FOUND,
                Some(_) => self.replace(index, key, in_store, None, &[]),
            };
        }
        // No other variable can be made at run time, and none can change its attributes.
        if attributes != STORED || old.is_some_and(|(a, _)| a != STORED) {
            return Status::INVALID_PARAMETER;
        }
        match (old, index) {
            _ if append && data.is_empty() => Status::SUCCESS,
            (Some((_, before)), _) if append && before.saturating_add(data.len()) > DATA_MAX => {
                Status::OUT_OF_RESOURCES
            }
            (Some(_), Some(index)) if append => self.append(index, data),
            (Some(_), None) if append => {
                let Base::Present { data: before, .. } = base else { return Status::DEVICE_ERROR };
                self.replace(None, key, in_store, Some(before), data)
            }
            _ => self.replace(index, key, in_store, Some(data), &[]),
        }
    }

    /// Puts an entry in the place of the one at `index`, or adds one. `content` is `None` for a deletion, and is followed
    /// by `rest`.
    fn replace(
        &mut self,
        index: Option<usize>,
        key: Key<'_>,
        in_store: bool,
        content: Option<&[u8]>,
        rest: &[u8],
    ) -> Status {
        let parts = [key.name, content.unwrap_or_default(), rest];
        let need = parts.iter().map(|p| p.len()).fold(0, usize::saturating_add);
        let freed = index.and_then(|i| self.live().get(i)).map_or(0, Entry::len);
        let full = index.is_none() && self.count() == ENTRIES_MAX;
        if full || self.used().saturating_sub(freed).saturating_add(need) > ARENA {
            return Status::OUT_OF_RESOURCES;
        }
        if let Some(index) = index {
            self.remove(index);
        }
        // Firmware never knew what is to be gone.
        if content.is_none() && !in_store {
            return Status::SUCCESS;
        }
        let len = |n: usize| u32::try_from(n).unwrap_or(0);
        let entry = Entry {
            guid: *key.guid,
            name_len: len(key.name.len()),
            data_len: len(need.saturating_sub(key.name.len())),
            deleted: content.is_none().into(),
            in_store: in_store.into(),
            reserved: [0; 6],
        };
        let (mut at, count) = (self.used(), self.count());
        for part in parts {
            let end = at.saturating_add(part.len());
            if let Some(room) = self.arena.get_mut(at..end) {
                room.copy_from_slice(part);
            }
            at = end;
        }
        if let Some(slot) = self.entries.get_mut(count) {
            *slot = entry;
            self.count = self.count.saturating_add(1);
        }
        Status::SUCCESS
    }

    /// Appends to the content of the entry at `index`, which moves to the end.
    fn append(&mut self, index: usize, data: &[u8]) -> Status {
        let used = self.used();
        let Some(room) = self.arena.get_mut(used..used.saturating_add(data.len())) else {
            return Status::OUT_OF_RESOURCES;
        };
        room.copy_from_slice(data);
        let start = self.live().iter().take(index).map(Entry::len).fold(0, usize::saturating_add);
        let Some(entry) = self.live().get(index).copied() else { return Status::DEVICE_ERROR };
        // Its bytes go behind those of the entries after it, right before the new ones.
        if let Some(tail) = self.arena.get_mut(start..used) {
            tail.rotate_left(entry.len());
        }
        let last = self.count().saturating_sub(1);
        if let Some(tail) = self.entries.get_mut(index..=last) {
            tail.rotate_left(1);
        }
        if let Some(entry) = self.entries.get_mut(last) {
            entry.data_len = entry.data_len.saturating_add(u32::try_from(data.len()).unwrap_or(0));
        }
        Status::SUCCESS
    }

    fn remove(&mut self, index: usize) {
        let (used, count) = (self.used(), self.count());
        let start = self.live().iter().take(index).map(Entry::len).fold(0, usize::saturating_add);
        let len = self.live().get(index).map_or(0, Entry::len);
        if let Some(tail) = self.arena.get_mut(start..used) {
            tail.rotate_left(len);
        }
        if let Some(tail) = self.entries.get_mut(index..count) {
            tail.rotate_left(1);
        }
        self.count = self.count.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const GUID: [u8; 16] = [7; 16];

    fn wide(name: &str) -> Vec<u8> {
        name.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect()
    }

    fn overlay() -> Box<Overlay> {
        Box::new(Overlay::new_zeroed())
    }

    fn set(o: &mut Overlay, name: &str, attributes: u32, data: &[u8], base: Base<'_>) -> Status {
        o.set(Key { guid: &GUID, name: &wide(name) }, attributes, data, base)
    }

    fn get(o: &Overlay, name: &str) -> Option<Option<Vec<u8>>> {
        o.get(Key { guid: &GUID, name: &wide(name) }).map(|wanted| match wanted {
            Wanted::Deleted => None,
            Wanted::Content(data) => Some(data.to_vec()),
        })
    }

    #[test]
    fn a_write_is_seen_and_a_deletion_hides_what_firmware_has() {
        let mut o = overlay();
        assert_eq!(set(&mut o, "A", 7, b"new", Base::Absent), Status::SUCCESS);
        assert_eq!(get(&o, "A"), Some(Some(b"new".to_vec())));
        assert_eq!(set(&mut o, "B", 7, b"", Base::Present { attributes: 7, data: b"old" }), Status::SUCCESS);
        assert_eq!((get(&o, "B"), o.count()), (Some(None), 2));
        assert_eq!(set(&mut o, "B", 7, b"", Base::Absent), Status::NOT_FOUND);
        // What firmware never had leaves nothing behind.
        assert_eq!(set(&mut o, "A", 0, b"x", Base::Absent), Status::SUCCESS);
        assert_eq!((get(&o, "A"), o.count()), (None, 1));
        assert_eq!(set(&mut o, "C", 7, b"", Base::Absent), Status::NOT_FOUND);
    }

    #[test]
    fn an_append_goes_behind_what_there_is() {
        let mut o = overlay();
        let base = Base::Present { attributes: 7, data: b"old" };
        assert_eq!(set(&mut o, "A", 0x47, b"+1", base), Status::SUCCESS);
        assert_eq!(set(&mut o, "B", 0x47, b"b", Base::Absent), Status::SUCCESS);
        assert_eq!(set(&mut o, "A", 0x47, b"+2", Base::Absent), Status::SUCCESS);
        assert_eq!(get(&o, "A"), Some(Some(b"old+1+2".to_vec())));
        assert_eq!(get(&o, "B"), Some(Some(b"b".to_vec())));
        assert_eq!(set(&mut o, "A", 0x47, &[0; DATA_MAX], Base::Absent), Status::OUT_OF_RESOURCES);
        assert_eq!(set(&mut o, "N", 0x47, b"", Base::Absent), Status::SUCCESS);
        assert_eq!(get(&o, "N"), None);
    }

    #[test]
    fn the_specifications_refusals_are_given() {
        let mut o = overlay();
        for (attributes, base, status) in [
            (0x27, Base::Absent, Status::SECURITY_VIOLATION),
            (7, Base::Present { attributes: 0x27, data: b"db" }, Status::SECURITY_VIOLATION),
            (6, Base::Absent, Status::INVALID_PARAMETER),
            (3, Base::Absent, Status::INVALID_PARAMETER),
            (0xf, Base::Absent, Status::INVALID_PARAMETER),
            (7, Base::Present { attributes: 6, data: b"volatile" }, Status::INVALID_PARAMETER),
        ] {
            assert_eq!(set(&mut o, "A", attributes, b"x", base), status, "{attributes:#x} {base:?}");
        }
        assert_eq!(set(&mut o, "", 7, b"x", Base::Absent), Status::INVALID_PARAMETER);
        assert_eq!(o.count(), 0);
    }

    #[test]
    fn what_is_full_refuses_and_keeps_all() {
        let mut o = overlay();
        for i in 0..ENTRIES_MAX {
            assert_eq!(set(&mut o, &format!("V{i}"), 7, b"x", Base::Absent), Status::SUCCESS);
        }
        assert_eq!(set(&mut o, "more", 7, b"x", Base::Absent), Status::OUT_OF_RESOURCES);
        assert_eq!(set(&mut o, "V3", 7, &[1; DATA_MAX], Base::Absent), Status::SUCCESS);
        assert_eq!(set(&mut o, "V4", 7, &[1; DATA_MAX], Base::Absent), Status::OUT_OF_RESOURCES);
        assert_eq!(get(&o, "V4"), Some(Some(b"x".to_vec())));
    }

    #[test]
    fn new_variables_are_listed_after_each_other() {
        let mut o = overlay();
        assert_eq!(set(&mut o, "A", 7, b"1", Base::Absent), Status::SUCCESS);
        assert_eq!(set(&mut o, "B", 7, b"1", Base::Present { attributes: 7, data: b"" }), Status::SUCCESS);
        assert_eq!(set(&mut o, "C", 7, b"1", Base::Absent), Status::SUCCESS);
        let (a, c) = (wide("A"), wide("C"));
        let (a, c) = (Key { guid: &GUID, name: &a }, Key { guid: &GUID, name: &c });
        assert_eq!((o.next_new(None), o.next_new(Some(a)), o.next_new(Some(c))), (Some(a), Some(c), None));
        assert!(o.is_new(a) && !o.is_new(Key { guid: &GUID, name: &wide("B") }));
    }

    #[test]
    fn a_key_ends_where_its_name_does() {
        let bytes = [wide("AB"), vec![1; 6]].concat();
        assert_eq!(Key::new((&GUID, &bytes)).unwrap().name, wide("AB"));
        assert_eq!(Key::new((&GUID, &[1; 6])), None);
    }

    proptest! {
        /// The overlay over a store is what the store would be.
        #[test]
        fn the_overlay_acts_as_a_store_does(
            ops in proptest::collection::vec(("[A-D]", prop_oneof![Just(7u32), Just(0x47)],
                proptest::collection::vec(any::<u8>(), 0..40)), 0..60)
        ) {
            let mut store = BTreeMap::from([("A".to_owned(), b"a".to_vec()), ("B".to_owned(), b"b".to_vec())]);
            let fixed = store.clone();
            let mut o = overlay();
            for (name, attributes, data) in ops {
                let base = fixed.get(&name).map_or(Base::Absent, |data| Base::Present { attributes: 7, data });
                let status = set(&mut o, &name, attributes, &data, base);
                let append = attributes & 0x40 != 0;
                let expected = match (append, data.is_empty(), store.contains_key(&name)) {
                    (true, true, _) => Status::SUCCESS,
                    (true, false, _) => {
                        store.entry(name.clone()).or_default().extend(&data);
                        Status::SUCCESS
                    }
                    (false, true, false) => Status::NOT_FOUND,
                    (false, true, true) => {
                        store.remove(&name);
                        Status::SUCCESS
                    }
                    (false, false, _) => {
                        store.insert(name.clone(), data);
                        Status::SUCCESS
                    }
                };
                prop_assert_eq!(status, expected);
                for name in ["A", "B", "C", "D"] {
                    let seen = get(&o, name).unwrap_or_else(|| fixed.get(name).cloned());
                    prop_assert_eq!(seen.as_ref(), store.get(name));
                }
            }
            // Committed, it gives that store.
            let mut committed = fixed;
            for index in 0..o.count() {
                let (key, wanted) = o.at(index).unwrap();
                let name = String::from_utf16(
                    &key.name.chunks(2).map(|c| u16::from_le_bytes([c[0], c[1]])).collect::<Vec<_>>(),
                ).unwrap();
                let name = name.trim_end_matches('\0').to_owned();
                match wanted {
                    Wanted::Deleted => committed.remove(&name),
                    Wanted::Content(data) => committed.insert(name, data.to_vec()),
                };
            }
            prop_assert_eq!(committed, store);
        }
    }
}
