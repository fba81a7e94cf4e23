//! Numbers and tables for text output, and the shapes of public models.

use clap::builder::PossibleValuesParser;
use dllm_kernels::{Config, Error, Result};

/// Parser for `--shape`.
pub fn shape() -> PossibleValuesParser {
    PossibleValuesParser::new(Config::SHAPES)
}

/// Returns the configuration of the public model `name`.
///
/// # Errors
/// [`Error::Argument`] for an unknown name.
pub fn shape_config(name: &str) -> Result<Config> {
    Config::shape(name).ok_or_else(|| Error::argument("shape", format!("one of {}", Config::SHAPES.join(", ")), name))
}

/// Formats a size in the binary unit that gives a number below 1024.
pub fn bytes(n: usize) -> String {
    let (mut value, mut unit) = (n as f64, "B");
    for next in ["KiB", "MiB", "GiB", "TiB", "PiB"] {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    if unit == "B" { format!("{n} B") } else { format!("{value:.1} {unit}") }
}

/// Formats a count with its noun: `1 thread`, `2 threads`.
pub fn count(n: usize, thing: &str) -> String {
    format!("{n} {thing}{}", if n == 1 { "" } else { "s" })
}

/// Formats rows as a table, the first of them its head. The first column is flush left, the others flush right. Columns
/// with an empty body are left out.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let cell = |row: &Vec<String>, c: usize| row.get(c).cloned().unwrap_or_default();
    // A column with nothing but its head is left out.
    let shown: Vec<usize> =
        (0..columns).filter(|c| *c == 0 || rows.iter().skip(1).any(|r| !cell(r, *c).is_empty())).collect();
    let width = |c: usize| rows.iter().map(|r| cell(r, c).chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for c in &shown {
            let (cell, width) = (cell(row, *c), width(*c));
            match c {
                0 => line += &format!("{cell:<width$}"),
                _ => line += &format!("  {cell:>width$}"),
            }
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_for_people() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(16_031_678_464), "14.9 GiB");
        assert!(bytes(usize::MAX).ends_with("PiB"));
    }

    #[test]
    fn tables_leave_out_empty_columns() {
        let row = |cells: [&str; 3]| cells.map(String::from).to_vec();
        assert_eq!(table(&[row(["mode", "suffix", "ms"]), row(["a", "", "10"])]), "mode  ms\na     10\n");
        assert_eq!(table(&[]), "");
    }
}
