//! Results of `dllm bench`: one JSON object, or tables.

use super::originals::Answer;
use super::timed::{Forward, Timing, adaptive_macs};
use super::{Run, Setup, Source, Subject, median};
use crate::machine::Roofs;
use crate::report::{bytes, count, table};
use dllm_kernels::engine::KernelCounts;
use serde::Serialize;
use std::collections::BTreeMap;

/// Results of all modes.
#[derive(Serialize)]
pub struct Summary {
    #[serde(skip_serializing_if = "Option::is_none")]
    shape: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<String>,
    family: String,
    prompt_length: usize,
    gen_length: usize,
    block_length: usize,
    batch: usize,
    device: String,
    threads: usize,
    rounds: usize,
    /// Bytes of weights that every forward reads at least once.
    weight_bytes_per_forward: usize,
    /// Measured in this run; null on a CPU.
    roofs: Option<Roofs>,
    originals: Versions,
    modes: Vec<Line>,
}

/// Versions of the reference implementation, or the reason why it was not measured.
#[derive(Serialize)]
#[serde(untagged)]
enum Versions {
    Measured {
        torch: String,
        revision: Option<String>,
        /// Rounds that it completed.
        rounds: usize,
        /// Reason why it did not complete all rounds.
        stopped: Option<String>,
    },
    Not(String),
}

/// Results of one mode.
#[derive(Serialize)]
struct Line {
    name: &'static str,
    nfe: usize,
    seconds: Vec<f64>,
    ms_per_forward: f64,
    /// MACs of matrix products and attention as executed, averaged over the forwards.
    #[serde(rename = "multiply_adds_per_forward")]
    macs_per_forward: f64,
    /// MACs of the adaptive cache by the arithmetic of `docs/cache-design.md`.
    #[serde(rename = "reckoned_multiply_adds_per_forward", skip_serializing_if = "Option::is_none")]
    expected_macs_per_forward: Option<f64>,
    kinds: BTreeMap<&'static str, Kind>,
    /// Kernels and products per pass on a CUDA device, counted as nodes of its graphs.
    #[serde(skip_serializing_if = "Option::is_none")]
    launches: Option<KernelCounts>,
    /// Number of generated tokens, divided by the median of the seconds.
    tokens_per_second: f64,
    /// Seconds of the whole decode in mode vanilla, divided by those of this mode.
    ratio_to_vanilla: Option<f64>,
    /// MACs of the whole decode in mode vanilla, divided by those of this mode.
    work_ratio_to_vanilla: Option<f64>,
    original_nfe: Option<usize>,
    original_ms_per_forward: Option<f64>,
    /// Milliseconds per forward of the reference implementation, divided by ours.
    speedup: Option<f64>,
}

/// Forwards of one kind. `ms`, `rows` and `macs` are medians over all rounds.
#[derive(Serialize)]
struct Kind {
    /// Forwards in one decode.
    count: usize,
    ms: f64,
    ms_min: f64,
    ms_max: f64,
    rows: f64,
    #[serde(rename = "multiply_adds")]
    macs: f64,
    /// Two operations per MAC, divided by the sum of the times.
    gflops: f64,
}

impl Kind {
    /// Summarizes the forwards of `kind` in `n` decodes; `None` if there are none.
    fn from_timings<'a>(timings: impl IntoIterator<Item = &'a Timing>, kind: Forward, n: usize) -> Option<Kind> {
        let own: Vec<&Timing> = timings.into_iter().filter(|t| t.kind == kind).collect();
        if own.is_empty() {
            return None;
        }
        let ms = || own.iter().map(|t| 1000.0 * t.seconds);
        let work = || own.iter().map(|t| t.macs);
        Some(Kind {
            count: own.len() / n.max(1),
            ms: median(ms()),
            ms_min: ms().fold(f64::INFINITY, f64::min),
            ms_max: ms().fold(0.0, f64::max),
            rows: median(own.iter().map(|t| t.rows as f64)),
            macs: median(work()),
            gflops: 2e-6 * work().sum::<f64>() / ms().sum::<f64>().max(1e-6),
        })
    }
}

impl Summary {
    /// Summarizes the runs. `answer` is the last one of the reference implementation; `why` is the reason why there is none,
    /// or why there are no further rounds.
    pub fn new(setup: &Setup, subject: &Subject, runs: &[Run], answer: Option<Answer>, why: Option<String>) -> Summary {
        let vanilla = runs.iter().find(|r| r.mode == super::Mode::Vanilla);
        let work = |run: &Run| run.timings.iter().map(|t| t.macs).sum::<f64>() / run.seconds.len().max(1) as f64;
        let line = |run: &Run| {
            let seconds = median(run.seconds.clone()).max(1e-9);
            let ms_per_forward = 1000.0 * seconds / run.nfe.max(1) as f64;
            let kind = |kind: Forward| Some((kind.name(), Kind::from_timings(&run.timings, kind, run.seconds.len())?));
            let forwards = run.nfe.max(1) as f64;
            // The arithmetic assumes one token per forward.
            let expected = adaptive_macs(setup, &run.mode.options(setup)).filter(|_| run.nfe == setup.gen_length);
            let measured = !run.original.is_empty();
            let original = measured.then(|| 1000.0 * median(run.original.clone()) / run.original_nfe.max(1) as f64);
            Line {
                name: run.mode.name(),
                nfe: run.nfe,
                seconds: run.seconds.clone(),
                ms_per_forward,
                macs_per_forward: work(run) / forwards,
                expected_macs_per_forward: expected.map(|all| all / forwards),
                kinds: Forward::ALL.into_iter().filter_map(kind).collect(),
                launches: run.launches,
                tokens_per_second: (setup.batch * setup.gen_length) as f64 / seconds,
                ratio_to_vanilla: vanilla.map(|v| median(v.seconds.clone()) / seconds),
                work_ratio_to_vanilla: vanilla.map(|v| work(v) / work(run).max(1.0)),
                original_nfe: measured.then_some(run.original_nfe),
                original_ms_per_forward: original,
                speedup: original.map(|o| o / ms_per_forward),
            }
        };
        Summary {
            shape: match &setup.source {
                Source::Random(shape) => Some(shape.clone()),
                Source::Checkpoint(_) => None,
            },
            model: match &setup.source {
                Source::Random(_) => None,
                Source::Checkpoint(dir) => Some(dir.display().to_string()),
            },
            family: setup.config.family.to_string(),
            prompt_length: setup.prompt.len(),
            gen_length: setup.gen_length,
            block_length: setup.block_length,
            batch: setup.batch,
            device: subject.device.clone(),
            threads: setup.threads,
            rounds: runs.first().map_or(0, |r| r.seconds.len()),
            weight_bytes_per_forward: subject.bytes_per_forward,
            roofs: subject.roofs,
            originals: match answer {
                Some(Answer { torch, revision, .. }) => {
                    let rounds = runs.first().map_or(0, |r| r.original.len());
                    Versions::Measured { torch, revision, rounds, stopped: why }
                }
                None => Versions::Not(why.unwrap_or_else(|| "not measured".into())),
            },
            modes: runs.iter().map(line).collect(),
        }
    }

    /// Formats the results as tables.
    pub fn text(&self, subject: &Subject, runs: &[Run]) -> String {
        let name = match (&self.shape, &self.model) {
            (Some(shape), _) => format!("{shape}, random weights"),
            (None, model) => model.clone().unwrap_or_default(),
        };
        let parameters = subject.parameters as f64 / 1e6;
        let mut text = format!(
            "{name} ({}, {parameters:.1} M parameters), {}, {} of {} prompt tokens, {} generated in blocks of {}, {}, {}\n\n",
            self.family,
            self.device,
            count(self.batch, "sequence"),
            self.prompt_length,
            self.gen_length,
            self.block_length,
            count(self.threads, "thread"),
            count(self.rounds, "round"),
        );
        text += &table(&self.mode_rows());
        text += "\nTimes are medians. Columns full to verify: ms of a forward of that kind.\n\n";
        text += &table(&self.work_rows());
        text += "\nMACs of matrix products and attention, averaged over the forwards; expected: by docs/cache-design.md.\n\n";
        text += &table(&self.kind_rows(runs));
        let read = bytes(self.weight_bytes_per_forward);
        text += &format!("\nEvery forward reads at least {read} of weights; GB/s is that divided by its time.\n");
        let launches = self.modes.iter().filter_map(|line| line.launches);
        if let Some(KernelCounts { layer, pass }) = launches.min_by_key(|launches| launches.pass) {
            text += &format!(
                "A block step launches {pass} kernels and products, its first layer {layer}, as nodes of CUDA graphs.\n"
            );
        }
        if let Some(Roofs { bytes_per_second, operations_per_second }) = self.roofs {
            let (reads, products) = (digits(bytes_per_second / 1e9), digits(operations_per_second / 1e12));
            text += &format!(
                "Measured in this run: reads {reads} GB/s, matrix products in bf16 {products} TFLOP/s. The floor is the "
            );
            text += "larger of the times for reading the weights and for the MACs at these rates.\n";
        }
        text += "\n";
        text + &self.originals_text()
    }

    fn mode_rows(&self) -> Vec<Vec<String>> {
        let mut head = vec!["mode", "NFE", "seconds", "min-max", "ms/forward"];
        head.extend(Forward::ALL.map(Forward::name));
        head.extend(["tokens/s", "x vanilla"]);
        let mut rows = vec![head.into_iter().map(String::from).collect::<Vec<_>>()];
        for line in &self.modes {
            let kind = |kind: Forward| line.kinds.get(kind.name()).map_or(String::new(), |k| digits(k.ms));
            let min = line.seconds.iter().copied().fold(f64::INFINITY, f64::min);
            let max = line.seconds.iter().copied().fold(0.0, f64::max);
            let mut row = vec![
                line.name.into(),
                line.nfe.to_string(),
                digits(median(line.seconds.clone())),
                format!("{}-{}", digits(min), digits(max)),
                digits(line.ms_per_forward),
            ];
            row.extend(Forward::ALL.map(kind));
            row.push(digits(line.tokens_per_second));
            row.push(line.ratio_to_vanilla.map_or(String::new(), |r| format!("{r:.2}")));
            rows.push(row);
        }
        rows
    }

    /// Returns the table of MACs per mode.
    fn work_rows(&self) -> Vec<Vec<String>> {
        let head = ["mode", "G MAC/forward", "expected", "vanilla / this"];
        let mut rows = vec![head.map(String::from).to_vec()];
        let giga = |x: f64| format!("{:.3}", x / 1e9);
        for line in &self.modes {
            rows.push(vec![
                line.name.into(),
                giga(line.macs_per_forward),
                line.expected_macs_per_forward.map_or(String::new(), giga),
                line.work_ratio_to_vanilla.map_or(String::new(), |r| format!("{r:.2}")),
            ]);
        }
        rows
    }

    /// Returns the table of forwards by kind, over all modes.
    fn kind_rows(&self, runs: &[Run]) -> Vec<Vec<String>> {
        let mut head = vec!["forward", "rows", "ms", "min-max", "G MAC", "GFLOP/s", "GB/s"];
        if self.roofs.is_some() {
            head.extend(["floor ms", "x floor"]);
        }
        let mut rows = vec![head.into_iter().map(String::from).collect::<Vec<_>>()];
        for kind in Forward::ALL {
            let timings = runs.iter().flat_map(|r| &r.timings);
            let Some(k) = Kind::from_timings(timings, kind, 1) else { continue };
            let mut row = vec![
                kind.name().into(),
                k.rows.to_string(),
                digits(k.ms),
                format!("{}-{}", digits(k.ms_min), digits(k.ms_max)),
                digits(k.macs / 1e9),
                digits(k.gflops),
                digits(1e-6 * self.weight_bytes_per_forward as f64 / k.ms.max(1e-6)),
            ];
            if let Some(Roofs { bytes_per_second, operations_per_second }) = self.roofs {
                let reading = self.weight_bytes_per_forward as f64 / bytes_per_second;
                let floor_ms = 1000.0 * reading.max(2.0 * k.macs / operations_per_second);
                row.extend([digits(floor_ms), format!("{:.2}", k.ms / floor_ms)]);
            }
            rows.push(row);
        }
        rows
    }

    fn originals_text(&self) -> String {
        let (torch, revision, stopped) = match &self.originals {
            Versions::Not(why) => return format!("originals: {why}\n"),
            Versions::Measured { torch, revision, rounds, stopped } => {
                let stopped = stopped.as_ref().map(|why| format!(", {} only, then {why}", count(*rounds, "round")));
                (torch, revision.as_deref().unwrap_or("(unknown revision)"), stopped.unwrap_or_default())
            }
        };
        let head = ["mode", "NFE", "ms/forward", "reference NFE", "reference ms/forward", "reference / ours"];
        let mut rows = vec![head.map(String::from).to_vec()];
        for line in &self.modes {
            let number = |x: Option<f64>| x.map_or(String::new(), digits);
            rows.push(vec![
                line.name.into(),
                line.nfe.to_string(),
                digits(line.ms_per_forward),
                line.original_nfe.map_or(String::new(), |n| n.to_string()),
                number(line.original_ms_per_forward),
                line.speedup.map_or(String::new(), |r| format!("{r:.2}")),
            ]);
        }
        let device = if self.device == "cpu" { "in f32 on the CPU" } else { "in bf16 on the same device" };
        let random = if self.shape.is_some() { ", its own random weights" } else { "" };
        format!("originals: Fast-dLLM {revision}, torch {torch} {device}{random}{stopped}\n\n{}", table(&rows))
    }
}

/// Formats a number with at least three significant digits.
fn digits(x: f64) -> String {
    match x.abs() {
        x if x >= 100.0 => format!("{x:.0}"),
        x if x >= 10.0 => format!("{x:.1}"),
        x if x >= 1.0 => format!("{x:.2}"),
        x => format!("{x:.3}"),
    }
}
