//! A folder per run, `build/run-XXXXXX`: sockets, logs, variable store, disk image.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// Finished runs that are kept, for their logs.
const KEEP: usize = 10;

/// The folder of a run in progress. Its files stay when it is dropped; later runs clear away old ones.
pub struct RunDir {
    path: PathBuf,
    /// Held open: locked, it tells other runs that this one is alive; the folder's own descriptor gives
    /// sockets a path that fits the 108 bytes a socket address has, however deep the folder lies.
    _lock: File,
    folder: File,
}

impl RunDir {
    /// Makes a new folder below `parent` and removes old ones.
    pub fn create(parent: &Path) -> Result<Self> {
        fs::create_dir_all(parent)?;
        let path = tempfile::Builder::new()
            .prefix("run-")
            .tempdir_in(parent)
            .with_context(|| format!("a run folder in {}", parent.display()))?
            .keep();
        let lock = File::create(path.join("lock"))?;
        lock.lock()?;
        remove_old(parent);
        Ok(Self { folder: File::open(&path)?, _lock: lock, path })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A file in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// A short path to a socket in it, good in this process only.
    pub fn socket(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.folder.as_raw_fd()))
    }

    /// Connects to a socket that a child process is about to make.
    pub fn connect(&self, name: &str) -> Result<UnixStream> {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            match UnixStream::connect(self.socket(name)) {
                Ok(stream) => return Ok(stream),
                Err(e) if Instant::now() > end => {
                    return Err(e).with_context(|| format!("{} does not answer", self.file(name).display()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}

/// Removes all but the newest finished runs. Failing to is no reason to stop.
fn remove_old(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    let mut finished: Vec<_> = entries
        .flatten()
        .filter(|e| e.file_name().to_string_lossy().starts_with("run-"))
        .filter_map(|e| Some((e.metadata().ok()?.modified().ok()?, e.path())))
        .filter(|(_, path)| File::open(path.join("lock")).is_ok_and(|lock| lock.try_lock().is_ok()))
        .collect();
    finished.sort();
    for (_, path) in finished.iter().rev().skip(KEEP) {
        let _ = fs::remove_dir_all(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_runs_go_and_live_ones_stay() {
        let parent = tempfile::tempdir().unwrap();
        let live: Vec<_> = (0..2).map(|_| RunDir::create(parent.path()).unwrap()).collect();
        for _ in 0..KEEP + 3 {
            RunDir::create(parent.path()).unwrap();
        }
        RunDir::create(parent.path()).unwrap();
        assert!(live.iter().all(|run| run.path().exists()));
        let left = fs::read_dir(parent.path()).unwrap().count();
        assert!(left <= KEEP + live.len() + 1, "{left}");
    }
}
