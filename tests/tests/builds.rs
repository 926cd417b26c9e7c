//! What a launch measures must not depend on who built it, where and when.

use std::fs;
use std::path::Path;

use tests::{images, paths};

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
