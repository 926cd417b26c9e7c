//! Text that firmware or a log named, fit for a terminal.

/// UTF-8 as far as it is, without what moves a cursor, turns writing round, or cannot be seen. A character that was cut at the
/// end is left out.
pub fn printable(bytes: &[u8]) -> String {
    let mut text = String::new();
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            match character {
                '"' | '\'' | '\\' => text.push(character),
                _ => text.extend(character.escape_debug()),
            }
        }
        let invalid = chunk.invalid();
        let cut = std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none());
        if !cut {
            text.push_str(&invalid.escape_ascii().to_string());
        }
    }
    text
}

/// The same, with line ends and tabs kept: a text of several lines.
pub fn printable_lines(bytes: &[u8]) -> String {
    bytes.split(|byte| *byte == b'\n').map(printable).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_moves_the_cursor_or_hides() {
        assert_eq!(printable("Boot\u{d6}rder \"1\"".as_bytes()), "BootÖrder \"1\"");
        assert_eq!(printable(b"\x1b[2J\r\n\t"), "\\u{1b}[2J\\r\\n\\t");
        assert_eq!(printable("a\u{202e}b\u{200b}".as_bytes()), "a\\u{202e}b\\u{200b}");
        assert_eq!(printable(b"a\xffb\xc3"), "a\\xffb");
        assert_eq!(printable_lines(b"a\nb\x07\n"), "a\nb\\u{7}\n");
    }
}
