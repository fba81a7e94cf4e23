//! Drawing in place on a terminal (stderr): styled tokens, wrapped to its width and cut to its height.

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};

/// How a token looks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Style {
    /// Still masked, or of no interest.
    Dim,
    /// Committed in this step.
    New,
    /// Committed before, with this confidence in [0, 1].
    Settled(f64),
}

/// One token on the screen. Its text is tame, see [`tame`].
#[derive(Clone, Debug)]
pub struct Cell {
    /// The text; may hold line ends.
    pub text: String,
    /// Its looks.
    pub style: Style,
}

const RESET: &str = "\x1b[0m";
/// From grey to green, of the 256 colours: the more confident, the greener.
const RAMP: [u8; 6] = [242, 246, 108, 71, 70, 76];

/// Whether a cursor is hidden that somebody has to show again.
static HIDDEN: AtomicBool = AtomicBool::new(false);

/// Gives the terminal back its cursor and line wrapping. Does nothing when they were not taken.
pub fn restore() {
    if HIDDEN.swap(false, Ordering::Relaxed) {
        let mut stderr = io::stderr();
        let _ = stderr.write_all(b"\x1b[0m\x1b[?7h\x1b[?25h").and_then(|()| stderr.flush());
    }
}

/// Text without characters that could move a cursor, change colours or turn the writing direction. Line ends stay.
pub fn tame(text: &str) -> String {
    text.chars().map(tame_char).collect()
}

fn tame_char(c: char) -> char {
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

/// The part of a terminal that is drawn over again and again.
pub struct Screen {
    colors: bool,
    /// Lines of the last frame.
    drawn: usize,
}

impl Screen {
    /// The terminal behind stderr; `None` when there is none that can be drawn on.
    pub fn open() -> Option<Screen> {
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb" || term.is_empty());
        if dumb || !io::stderr().is_terminal() {
            return None;
        }
        let colors = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Some(Screen { colors, drawn: 0 })
    }

    /// Draws over the last frame. `focus` is the cell that has to be visible when not all are.
    pub fn draw(&mut self, header: &str, cells: &[Cell], focus: usize) {
        let (columns, rows) = size();
        let (lines, focus_line) = self.lay_out(cells, columns, focus);
        // One row for the header, one so that the last line never scrolls.
        let room = rows.saturating_sub(2).max(1);
        let first = (focus_line + 1).saturating_sub(room).min(lines.len().saturating_sub(room));
        let header: String = header.chars().take(columns).collect();
        let shown = || std::iter::once(header.as_str()).chain(lines.iter().skip(first).take(room).map(String::as_str));
        // Without line wrapping a width that was guessed wrong costs a character, not the frame.
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

    /// Back to the first character of the last frame.
    fn home(&self) -> String {
        match self.drawn {
            0 | 1 => "\r".into(),
            n => format!("\r\x1b[{}A", n - 1),
        }
    }

    /// Lines of at most `columns` characters, and the line that `focus` ends on.
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
                // Runs of one style are told once: frames of a large region stay small.
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

/// However the decode ended: the frame goes, so that the answer on stdout is what stays, and the cursor comes back.
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

/// Columns and rows of the terminal.
fn size() -> (usize, usize) {
    let found = terminal_size::terminal_size_of(io::stderr());
    let (columns, rows) = found.map_or((80, 24), |(w, h)| (usize::from(w.0), usize::from(h.0)));
    // Terminals that do not know say 0.
    (if columns == 0 { 80 } else { columns }, if rows == 0 { 24 } else { rows })
}

/// Columns that a character takes; where in doubt, the wider guess.
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
        let tamed = tame("a\x1b[2J\u{9b}31m\r\x07b\u{202e}c\n");
        assert!(tamed.chars().all(|c| c == '\n' || !c.is_control()), "{tamed:?}");
        assert!(!tamed.contains('\u{202e}') && tamed.starts_with('a') && tamed.ends_with("c\n"), "{tamed:?}");
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
