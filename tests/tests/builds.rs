//! What a launch measures must not depend on who built it, where and when.

use std::fs;
use std::path::Path;

use hv::launch::MleHeader;
use tests::{images, paths};
use zerocopy::FromBytes;

/// Copies a source tree without what is made from it.
fn copy_sources(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let (name, path) = (entry.file_name(), entry.path());
        if ["target", "build", ".git"].iter().any(|made| name == *made) {
            continue;
        }
        if entry.file_type().unwrap().is_dir() {
            copy_sources(&path, &to.join(name));
        } else {
            fs::copy(&path, to.join(name)).unwrap();
        }
    }
}

/// One image serves both launches: SINIT finds it by a UUID, and insists that there is one alone.
#[test]
fn sinit_finds_the_mle_in_the_image() {
    const UUID: [u8; 16] = *b"\x5a\xac\x82\x90\x6f\x47\xa7\x74\x0f\x5c\x55\xa2\xcb\x51\xb6\x42";
    const GETSEC: [u8; 2] = [0x0f, 0x37];
    images::build().unwrap();
    let image = fs::read(paths::mle()).unwrap();
    let places = |bytes: &[u8]| -> Vec<usize> {
        image.windows(bytes.len()).enumerate().filter(|(_, w)| *w == bytes).map(|(at, _)| at).collect()
    };
    let (header, _) = MleHeader::read_from_prefix(&image).unwrap();
    let at = usize::try_from(header.txt_header.get()).unwrap();
    assert_eq!(places(&UUID), [at]);
    let word = |offset: usize| u32::from_le_bytes(image[at + offset..][..4].try_into().unwrap());
    // Length, version 2.2, entry point, first valid page, MLE start and end, capabilities, command line.
    let words: Vec<u32> = (16..52).step_by(4).map(word).collect();
    let entry = u32::try_from(at + 52).unwrap();
    let size = u32::try_from(image.len()).unwrap();
    assert_eq!(words, [52, 0x2_0002, entry, 0, 0, size, 0x227, 0, 0]);
    assert!(image.len().is_multiple_of(4096) && entry < 4096);
    // CLI, CLD.
    assert_eq!(image[at + 52..][..2], [0xfa, 0xfc]);
    // The one place that executes it is in the first page; elsewhere the bytes are chance.
    assert_eq!(places(&GETSEC).iter().filter(|at| **at < 4096).count(), 1);
}

#[test]
fn a_clean_build_elsewhere_gives_the_same_images() {
    images::build().unwrap();
    let folder = tempfile::tempdir().unwrap();
    // A path of another length, with a character that tools like to quote.
    let copy = folder.path().join("another place");
    copy_sources(&paths::root(), &copy);
    let made = images::build_from(&copy, folder.path().join("target")).unwrap();
    for (made, ours) in made.iter().zip([paths::slb(), paths::mle(), paths::loader()]) {
        assert!(fs::read(made).unwrap() == fs::read(&ours).unwrap(), "{} differs", ours.display());
    }
}
