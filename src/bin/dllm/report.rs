//! What the measuring commands share: numbers and tables for people, and the public shapes by name.

use crate::args::argument;
use clap::ValueEnum;
use dllm_kernels::{Config, Result};

/// A shape that needs no checkpoint.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Shape {
    #[value(name = "llada-8b")]
    Llada8b,
    #[value(name = "dream-7b")]
    Dream7b,
    Mid,
}

impl Shape {
    pub fn name(self) -> &'static str {
        match self {
            Shape::Llada8b => "llada-8b",
            Shape::Dream7b => "dream-7b",
            Shape::Mid => "mid",
        }
    }

    pub fn config(self) -> Result<Config> {
        Config::shape(self.name()).ok_or_else(|| argument("shape", "a public shape", self.name()))
    }
}

/// Bytes in the binary unit that leaves a number below 1024.
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

/// `1 thread`, `2 threads`.
pub fn count(n: usize, thing: &str) -> String {
    format!("{n} {thing}{}", if n == 1 { "" } else { "s" })
}

/// Columns beside each other: the first flush left, the others flush right. Empty columns are left out.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let cell = |row: &Vec<String>, c: usize| row.get(c).cloned().unwrap_or_default();
    // The head alone does not make a column.
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
