//! QEMU's control protocol, as far as the bench needs it: commands, and why a machine ended.
//!
//! Spec: QEMU "QMP Reference Manual".

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// A connection that collects events.
pub struct Qmp {
    stream: UnixStream,
    events: Arc<Mutex<Vec<Value>>>,
}

impl Qmp {
    /// Negotiates and starts to listen.
    pub fn new(mut stream: UnixStream) -> Result<Self> {
        stream.write_all(b"{\"execute\":\"qmp_capabilities\"}\n").context("QMP")?;
        let events = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&events);
        let reader = BufReader::new(stream.try_clone()?);
        thread::spawn(move || {
            for line in reader.lines().map_while(Result::ok) {
                if let Ok(message) = serde_json::from_str::<Value>(&line)
                    && message.get("event").is_some()
                {
                    sink.lock().unwrap_or_else(PoisonError::into_inner).push(message);
                }
            }
        });
        Ok(Self { stream, events })
    }

    /// Sends a command without arguments, and does not wait for its effect.
    pub fn execute(&mut self, command: &str) -> Result<()> {
        self.execute_with(command, &json!({}))
    }

    /// Sends a command, and does not wait for its effect.
    pub fn execute_with(&mut self, command: &str, arguments: &Value) -> Result<()> {
        writeln!(self.stream, "{}", json!({ "execute": command, "arguments": arguments })).context("QMP")
    }

    /// Why the machine was last reset or shut down, in QEMU's words.
    pub fn last_end(&self) -> Option<String> {
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        events.iter().rev().find_map(|message| {
            let event = message.get("event")?.as_str()?;
            let reason = message.get("data")?.get("reason")?.as_str()?;
            matches!(event, "SHUTDOWN" | "RESET").then(|| reason.to_owned())
        })
    }
}
