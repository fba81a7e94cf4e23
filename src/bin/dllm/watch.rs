//! `--watch`: shows the generated region while it is unmasked, in place on a terminal, or as a line per step elsewhere.

use crate::output;
use crate::screen::{Cell, Screen, Style, sanitize};
use dllm_kernels::decode::SequenceStep;
use dllm_kernels::tokenizer::Tokenizer;
use dllm_kernels::{Config, Observer, Options, Step};
use std::ops::Range;
use std::time::{Duration, Instant};

/// Minimum time of a frame. Steps of a small model are too fast to see.
const FRAME: Duration = Duration::from_millis(70);

/// Maximum number of tokens of one character, in byte-level vocabularies.
const LONGEST_CHARACTER: usize = 4;

/// Observer that draws every step.
pub struct Watch<'a> {
    tokenizer: Option<&'a Tokenizer>,
    mask: u32,
    end_tokens: &'a [u32],
    block_length: usize,
    blocks: usize,
    prompt_lens: Vec<usize>,
    /// Confidence at which each token was committed, per sequence.
    confidence: Vec<Vec<f64>>,
    screen: Option<Screen>,
    start: Instant,
    paused: Duration,
}

impl<'a> Watch<'a> {
    /// Opens the screen for a decode. `options` and `prompts` must have been validated.
    pub fn new(
        tokenizer: Option<&'a Tokenizer>,
        end_tokens: &'a [u32],
        config: &Config,
        options: &Options,
        prompts: &[Vec<u32>],
    ) -> Watch<'a> {
        Watch {
            tokenizer,
            mask: config.mask_token_id,
            end_tokens,
            block_length: options.block_length(),
            blocks: options.gen_length / options.block_length(),
            prompt_lens: prompts.iter().map(Vec::len).collect(),
            confidence: vec![vec![0.0; options.gen_length]; prompts.len()],
            screen: Screen::open(),
            start: Instant::now(),
            paused: Duration::ZERO,
        }
    }

    /// Returns the time spent on drawing and on waiting between frames.
    pub fn paused(&self) -> Duration {
        self.paused
    }

    fn remember(&mut self, s: usize, step: &SequenceStep) {
        for (position, confidence) in step.candidates.iter().zip(&step.confidence) {
            let entry = position.checked_sub(self.prompt_lens[s]).and_then(|i| self.confidence[s].get_mut(i));
            if let Some(entry) = entry.filter(|_| step.transferred.binary_search(position).is_ok()) {
                // Negative entropies become e^-H, which is in (0, 1] like the others.
                *entry = if *confidence < 0.0 { confidence.exp() } else { *confidence };
            }
        }
    }

    fn block(&self, s: usize, step: &SequenceStep) -> usize {
        (step.block.start - self.prompt_lens[s]) / self.block_length + 1
    }

    fn masks(&self, step: &SequenceStep) -> usize {
        step.tokens.iter().filter(|t| **t == self.mask).count()
    }

    /// Returns the text to show for each token; all of them form the text of the region.
    fn pieces(&self, tokens: &[u32]) -> Vec<String> {
        let mut pieces = Vec::with_capacity(tokens.len());
        while let Some(token) = tokens.get(pieces.len()) {
            if *token == self.mask {
                pieces.push("░".into());
            } else if self.end_tokens.contains(token) {
                pieces.push("·".into());
            } else if let Some(tokenizer) = self.tokenizer {
                let (piece, taken) = self.character(tokenizer, &tokens[pieces.len()..]);
                pieces.push(sanitize(&piece));
                pieces.extend((1..taken).map(|_| String::new()));
            } else {
                pieces.push(format!("{token} "));
            }
        }
        pieces
    }

    /// Returns the text of the first token, or of the first tokens if they form one character, and their number.
    fn character(&self, tokenizer: &Tokenizer, tokens: &[u32]) -> (String, usize) {
        let alone = tokenizer.token(tokens[0]).unwrap_or_else(|| "\u{fffd}".into());
        if !alone.contains(char::REPLACEMENT_CHARACTER) {
            return (alone, 1);
        }
        for taken in 2..=LONGEST_CHARACTER.min(tokens.len()) {
            match tokenizer.decode(&tokens[..taken]) {
                _ if tokens[taken - 1] == self.mask => break,
                Ok(whole) if !whole.contains(char::REPLACEMENT_CHARACTER) => return (whole, taken),
                _ => {}
            }
        }
        (alone, 1)
    }

    fn lines(&self, step: &Step) {
        let batch = step.sequences.len();
        for (s, sequence) in step.sequences.iter().enumerate().filter(|(_, q)| q.active) {
            let which = if batch > 1 { format!("seq {}/{batch}  ", s + 1) } else { String::new() };
            output::note(format_args!(
                "step {:2}  {which}block {}/{}  +{}  masks {}  | {}",
                step.index,
                self.block(s, sequence),
                self.blocks,
                sequence.transferred.len(),
                self.masks(sequence),
                self.pieces(sequence.tokens).concat().replace('\n', "⏎"),
            ));
        }
    }

    fn header(&self, step: &Step) -> String {
        let active = || step.sequences.iter().enumerate().filter(|(_, q)| q.active);
        let block = active().map(|(s, q)| self.block(s, q)).next().unwrap_or(1);
        let masks: usize = step.sequences.iter().map(|q| self.masks(q)).sum();
        let committed: usize = step.sequences.iter().map(|q| q.tokens.len() - self.masks(q)).sum();
        let seconds = self.start.elapsed().saturating_sub(self.paused).as_secs_f64().max(1e-9);
        let rate = committed as f64 / seconds;
        format!(
            "step {}  block {block}/{}  masks {masks}  NFE {}  {rate:.0} tokens/s",
            step.index,
            self.blocks,
            step.index + 1
        )
    }

    fn cells(&self, s: usize, step: &SequenceStep) -> Vec<Cell> {
        let style = |(i, token): (usize, &u32)| {
            if step.transferred.binary_search(&(self.prompt_lens[s] + i)).is_ok() {
                Style::New
            } else if *token == self.mask || self.end_tokens.contains(token) {
                Style::Dim
            } else {
                Style::Settled(self.confidence[s][i])
            }
        };
        let styles = step.tokens.iter().enumerate().map(style);
        self.pieces(step.tokens).into_iter().zip(styles).map(|(text, style)| Cell { text, style }).collect()
    }

    /// Returns the cells of all sequences, one below the other, and the cell where the current block ends.
    fn region(&self, step: &Step) -> (Vec<Cell>, usize) {
        let (mut cells, mut focus) = (Vec::new(), 0);
        for (s, sequence) in step.sequences.iter().enumerate() {
            if step.sequences.len() > 1 {
                let line_end = if s > 0 { "\n" } else { "" };
                cells.push(Cell { text: format!("{line_end}[{}] ", s + 1), style: Style::Dim });
            }
            let Range { end, .. } = sequence.block;
            if sequence.active {
                focus = cells.len() + (end - self.prompt_lens[s]).min(sequence.tokens.len()).saturating_sub(1);
            }
            cells.extend(self.cells(s, sequence));
        }
        (cells, focus)
    }
}

impl Observer for Watch<'_> {
    fn wants_steps(&self) -> bool {
        true
    }

    fn step(&mut self, step: &Step) {
        for (s, sequence) in step.sequences.iter().enumerate() {
            self.remember(s, sequence);
        }
        if self.screen.is_none() {
            self.lines(step);
            return;
        }
        let header = self.header(step);
        let (cells, focus) = self.region(step);
        let before = Instant::now();
        if let Some(screen) = &mut self.screen {
            screen.draw(&header, &cells, focus);
        }
        if !output::interrupted() {
            std::thread::sleep(FRAME);
        }
        self.paused += before.elapsed();
    }
}
