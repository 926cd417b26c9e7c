//! What the tests of the tool share.
#![allow(clippy::unwrap_used, reason = "helpers of tests stop their test by a panic")]

use std::path::PathBuf;
use std::process::Command;

/// A folder of its own; removed at the end.
pub struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Folder {
    pub fn new(test: &str) -> Self {
        let folder = Self(std::env::temp_dir().join(format!("cordon-{}-{test}", std::process::id())));
        std::fs::create_dir_all(&folder.0).unwrap();
        folder
    }

    pub fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    pub fn get(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.0.join(name)).unwrap()
    }

    pub fn put(&self, name: &str, data: &[u8]) -> String {
        std::fs::create_dir_all(self.0.join(name).parent().unwrap()).unwrap();
        std::fs::write(self.0.join(name), data).unwrap();
        self.path(name)
    }
}

/// Success, standard output, standard error.
pub fn cordon(arguments: &[&str]) -> (bool, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_cordon")).args(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.success(), text(output.stdout), text(output.stderr))
}
