//! In-place drawing on a terminal (stderr): styled tokens, wrapped to its width and clipped to its height.

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};

/// Style of a token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Style {
    /// Masked, or an end-of-text token.
    Dim,
    /// Committed in this step.
    New,
    /// Committed in an earlier step, with this confidence in [0, 1].
    Settled(f64),
}

/// One token on the screen, its text sanitized by [`sanitize`].
#[derive(Clone, Debug)]
pub struct Cell {
    /// Text; may contain line ends.
    pub text: String,
    /// Style.
    pub style: Style,
}

const RESET: &str = "\x1b[0m";
/// Colours of the 256-colour palette, from grey for low confidence to green for high.
const RAMP: [u8; 6] = [242, 246, 108, 71, 70, 76];

/// Set while the cursor is hidden, so that [`restore`] shows it again.
static HIDDEN: AtomicBool = AtomicBool::new(false);

/// Restores cursor and line wrapping of the terminal, if they were switched off.
pub fn restore() {
    if HIDDEN.swap(false, Ordering::Relaxed) {
        let mut stderr = io::stderr();
        let _ = stderr.write_all(b"\x1b[0m\x1b[?7h\x1b[?25h").and_then(|()| stderr.flush());
    }
}

/// Replaces characters that could move the cursor, change colours or the writing direction. Line ends stay.
pub fn sanitize(text: &str) -> String {
    text.chars().map(sanitize_char).collect()
}

fn sanitize_char(c: char) -> char {
    match c {
        '\n' => c,
        '\t' => ' ',
        c if c.is_control() => char::REPLACEMENT_CHARACTER,
        // Marks and overrides of direction, line and paragraph separators, invisible operators.
        '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' => {
            char::REPLACEMENT_CHARACTER
        }
        c => c,
    }
}

/// Region of a terminal that every frame draws over.
pub struct Screen {
    colors: bool,
    /// Number of lines of the last frame.
    drawn: usize,
}

impl Screen {
    /// Opens the terminal of stderr; `None` when stderr is no terminal, or a dumb one.
    pub fn open() -> Option<Screen> {
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb" || term.is_empty());
        if dumb || !io::stderr().is_terminal() {
            return None;
        }
        let colors = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Some(Screen { colors, drawn: 0 })
    }

    /// Draws a frame over the last one. `focus` is the cell to keep visible if not all fit.
    pub fn draw(&mut self, header: &str, cells: &[Cell], focus: usize) {
        let (columns, rows) = size();
        let (lines, focus_line) = self.lay_out(cells, columns, focus);
        // One row is for the header, and one stays free so that the last line never scrolls.
        let room = rows.saturating_sub(2).max(1);
        let first = (focus_line + 1).saturating_sub(room).min(lines.len().saturating_sub(room));
        let header: String = header.chars().take(columns).collect();
        let shown = || std::iter::once(header.as_str()).chain(lines.iter().skip(first).take(room).map(String::as_str));
        // Without line wrapping, a wrong character width spoils one character, not the frame.
        let mut frame = String::from("\x1b[?25l\x1b[?7l");
        frame += &self.home();
        for (i, line) in shown().enumerate() {
            frame += if i > 0 { "\r\n" } else { "" };
            frame += line;
            frame += "\x1b[K";
        }
        frame += "\x1b[J\x1b[?7h";
        self.drawn = shown().count();
        HIDDEN.store(true, Ordering::Relaxed);
        let mut stderr = io::stderr();
        let _ = stderr.write_all(frame.as_bytes()).and_then(|()| stderr.flush());
    }

    /// Returns the codes that move the cursor to the start of the last frame.
    fn home(&self) -> String {
        match self.drawn {
            0 | 1 => "\r".into(),
            n => format!("\r\x1b[{}A", n - 1),
        }
    }

    /// Wraps cells to lines of at most `columns` columns. Returns the lines, and the line in which cell `focus` ends.
    fn lay_out(&self, cells: &[Cell], columns: usize, focus: usize) -> (Vec<String>, usize) {
        let (mut lines, mut line, mut used, mut focus_line) = (Vec::new(), String::new(), 0, 0);
        let mut style = None;
        for (i, cell) in cells.iter().enumerate() {
            let sgr = self.sgr(cell.style);
            for c in cell.text.chars() {
                let width = width(c);
                if c == '\n' || used + width > columns {
                    line += RESET;
                    lines.push(std::mem::take(&mut line));
                    (used, style) = (0, None);
                }
                // One code per run of equal style keeps frames of a large region small.
                if style.as_ref() != Some(&sgr) {
                    line += RESET;
                    line += &sgr;
                    style = Some(sgr.clone());
                }
                if c != '\n' {
                    line.push(c);
                    used += width;
                }
            }
            if i == focus {
                focus_line = lines.len();
            }
        }
        lines.push(line + RESET);
        (lines, focus_line)
    }

    fn sgr(&self, style: Style) -> String {
        match style {
            Style::New if self.colors => "\x1b[1;7;38;5;76m".into(),
            Style::New => "\x1b[1;7m".into(),
            Style::Dim if self.colors => "\x1b[38;5;238m".into(),
            Style::Dim => "\x1b[2m".into(),
            Style::Settled(confidence) if self.colors => {
                let step = (confidence.clamp(0.0, 1.0) * RAMP.len() as f64) as usize;
                format!("\x1b[38;5;{}m", RAMP[step.min(RAMP.len() - 1)])
            }
            Style::Settled(_) => String::new(),
        }
    }
}

/// Clears the frame, so that only the answer on stdout remains, and shows the cursor.
impl Drop for Screen {
    fn drop(&mut self) {
        if self.drawn > 0 {
            let clear = format!("{}\x1b[J", self.home());
            let mut stderr = io::stderr();
            let _ = stderr.write_all(clear.as_bytes()).and_then(|()| stderr.flush());
        }
        restore();
    }
}

/// Returns columns and rows of the terminal, 80 and 24 if unknown.
fn size() -> (usize, usize) {
    let found = terminal_size::terminal_size_of(io::stderr());
    let (columns, rows) = found.map_or((80, 24), |(w, h)| (usize::from(w.0), usize::from(h.0)));
    // Terminals of unknown size report 0.
    (if columns == 0 { 80 } else { columns }, if rows == 0 { 24 } else { rows })
}

/// Returns the columns of a character; the wider one if in doubt.
fn width(c: char) -> usize {
    match c {
        '\u{2580}'..='\u{25ff}' => 1, // Blocks and shapes, the mask among them.
        '\u{1100}'..='\u{115f}' | '\u{2300}'.. => 2,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(text: &str) -> Cell {
        Cell { text: text.into(), style: Style::Settled(1.0) }
    }

    #[test]
    fn no_token_reaches_the_terminal_as_a_command() {
        let sanitized = sanitize("a\x1b[2J\u{9b}31m\r\x07b\u{202e}c\n");
        assert!(sanitized.chars().all(|c| c == '\n' || !c.is_control()), "{sanitized:?}");
        let ends = sanitized.starts_with('a') && sanitized.ends_with("c\n");
        assert!(!sanitized.contains('\u{202e}') && ends, "{sanitized:?}");
    }

    #[test]
    fn lines_fit_the_terminal() {
        let screen = Screen { colors: false, drawn: 0 };
        let (lines, focus) = screen.lay_out(&[cell("abcdef"), cell("gh\ni"), cell("漢字漢")], 4, 1);
        let plain: Vec<_> = lines.iter().map(|l| l.replace(RESET, "")).collect();
        assert_eq!(plain, ["abcd", "efgh", "i漢", "字漢"]);
        assert_eq!(focus, 2);
    }

    #[test]
    fn confidence_has_a_shade() {
        let screen = Screen { colors: true, drawn: 0 };
        assert_ne!(screen.sgr(Style::Settled(0.1)), screen.sgr(Style::Settled(0.99)));
        assert_eq!(screen.sgr(Style::Settled(1.0)), screen.sgr(Style::Settled(7.0)));
        let plain = Screen { colors: false, drawn: 0 };
        assert!(!plain.sgr(Style::New).contains("38;5") && plain.sgr(Style::Settled(0.5)).is_empty());
    }
}
