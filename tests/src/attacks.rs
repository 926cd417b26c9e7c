//! What came of attacks. A test says of each attack that failed under Cordon, and of each that succeeded without, by a
//! line on its standard output; the bench runs the tests and counts these lines.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::paths;

const BLOCKED: &str = "blocked under Cordon: ";
const LIVE: &str = "live without Cordon: ";
const RECORDED: &str = "on record under Cordon: ";
/// Set in the environment of tests that run with all that take long.
const ALL: &str = "CORDON_ALL_ATTACKS";

/// Says that `attack` came to what it should: nothing on a machine that Cordon protects, its aim on one that it does not.
/// Call it when the test has seen that.
pub fn seen(attack: &str, protected: bool) {
    println!("{}{attack}", if protected { BLOCKED } else { LIVE });
}

/// Says that what Cordon tells of itself, exposure log or `Status`, has the blocked `attack`.
pub fn recorded(attack: &str) {
    println!("{RECORDED}{attack}");
}

/// [`seen`] for an attack whose other half takes long: said only where such tests run too.
pub fn seen_of_long(attack: &str, protected: bool) {
    if std::env::var_os(ALL).is_some() {
        seen(attack, protected);
    }
}

/// All attacks that tests spoke of, in that order.
#[derive(Default)]
struct Board {
    rows: Vec<Row>,
}

#[derive(Default)]
struct Row {
    attack: String,
    blocked: bool,
    recorded: bool,
    live: bool,
}

impl Board {
    /// Takes note of a line of a test's output, if it speaks of an attack. The harness may have written something before it.
    fn note(&mut self, line: &str) {
        for mark in [BLOCKED, RECORDED, LIVE] {
            let Some((_, attack)) = line.split_once(mark) else { continue };
            let at = self.rows.iter().position(|row| row.attack == attack).unwrap_or_else(|| {
                self.rows.push(Row { attack: attack.to_owned(), ..Row::default() });
                self.rows.len() - 1
            });
            let row = &mut self.rows[at];
            let seen = match mark {
                BLOCKED => &mut row.blocked,
                RECORDED => &mut row.recorded,
                _ => &mut row.live,
            };
            *seen = true;
        }
    }

    /// Runs tests, by the name of their file and a part of their own, and takes note of what they say; whether they passed.
    fn run(&mut self, tests: &[&str], all: bool) -> Result<bool> {
        let mut command = Command::new("cargo");
        command.current_dir(paths::root()).stdout(Stdio::piped());
        command.args(["test", "-p", "tests", "--test"]).args(tests);
        // Most of these machines take one core each, and not all of it.
        command.args(["--", "--nocapture", "--test-threads=3"]);
        if all {
            command.arg("--include-ignored").env(ALL, "1");
        }
        let mut tests = command.spawn().context("starting cargo")?;
        for line in BufReader::new(tests.stdout.take().context("cargo's output")?).lines() {
            let line = line.context("the tests' output")?;
            self.note(&line);
            writeln!(std::io::stdout(), "{line}")?;
        }
        Ok(tests.wait().context("waiting for cargo")?.success())
    }

    /// One row for each attack; those of one attacker, which is what stands before the colon, follow each other.
    fn table(&self) -> String {
        let width = self.rows.iter().map(|row| row.attack.len()).fold("attack".len(), usize::max);
        let mut text = format!("{:<width$}  with Cordon  on record  without\n", "attack");
        let mut rows: Vec<_> = self.rows.iter().collect();
        rows.sort_by_key(|row| row.attack.split(':').next());
        for Row { attack, blocked, recorded, live } in rows {
            let with = if *blocked { "blocked" } else { "NOT SEEN" };
            let on_record = if *recorded { "yes" } else { "" };
            let without = if *live { "live" } else { "no control" };
            text.push_str(&format!("{attack:<width$}  {with:<11}  {on_record:<9}  {without}\n"));
        }
        let count = |is: fn(&Row) -> bool| self.rows.iter().filter(|row| is(row)).count();
        text.push_str(&format!("{} tried, {} seen on record\n", self.rows.len(), count(|r| r.recorded)));
        text.push_str(&format!("{} blocked, {} live unprotected", count(|r| r.blocked), count(|r| r.live)));
        text
    }
}

/// Runs the tests of attacks, with those that take long if `all`, and prints a table of what was seen and its sums.
pub fn run(all: bool) -> Result<()> {
    let mut board = Board::default();
    let mut failed = Vec::new();
    // The second are all of those that take long.
    for arguments in [&["attacks"][..], &["senter", "an_attack"]].into_iter().take(1 + usize::from(all)) {
        if !board.run(arguments, all)? {
            failed.push(arguments[0]);
        }
    }
    writeln!(std::io::stdout(), "{}", board.table())?;
    ensure!(failed.is_empty(), "the tests of attacks: {} failed", failed.join(", "));
    let unseen: Vec<_> =
        board.rows.iter().filter(|row| !row.blocked).map(|row| row.attack.as_str()).collect();
    ensure!(unseen.is_empty(), "not seen to fail under Cordon: {}", unseen.join(", "));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_attack_counts_once_for_each_machine() {
        let mut board = Board::default();
        for line in [
            "running 2 tests",
            "test dma ... blocked under Cordon: guest: a",
            "live without Cordon: guest: a",
            "blocked under Cordon: firmware: b",
            "on record under Cordon: firmware: b",
            "blocked under Cordon: guest: a",
        ] {
            board.note(line);
        }
        let table = "\
attack       with Cordon  on record  without
firmware: b  blocked      yes        no control
guest: a     blocked                 live
2 tried, 1 seen on record
2 blocked, 1 live unprotected";
        assert_eq!(board.table(), table);
    }

    #[test]
    fn what_is_only_seen_to_succeed_stands_out() {
        let mut board = Board::default();
        board.note("live without Cordon: a");
        assert_eq!(
            board.table(),
            "attack  with Cordon  on record  without\na       NOT SEEN                live\n1 tried, 0 seen on record\n0 blocked, 1 live unprotected"
        );
    }
}
