//! What `dllm bench` says: one JSON object, or tables.

use super::originals::Answer;
use super::timed::{Forward, Timing, adaptive_multiply_adds};
use super::{Run, Setup, Source, Subject, median};
use crate::machine::Roofs;
use crate::report::{bytes, count, table};
use dllm_kernels::engine::KernelCounts;
use serde::Serialize;
use std::collections::BTreeMap;

/// All results.
#[derive(Serialize)]
pub struct Summary {
    #[serde(skip_serializing_if = "Option::is_none")]
    shape: Option<&'static str>,
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
    /// Weights that every forward reads at least once.
    weight_bytes_per_forward: usize,
    /// Measured in this run; null on a CPU.
    roofs: Option<Roofs>,
    originals: Versions,
    modes: Vec<Line>,
}

/// What the original ran on, or why it did not.
#[derive(Serialize)]
#[serde(untagged)]
enum Versions {
    Measured {
        torch: String,
        revision: Option<String>,
        /// The rounds that it took part in, and why not in all.
        rounds: usize,
        stopped: Option<String>,
    },
    Not(String),
}

/// One mode.
#[derive(Serialize)]
struct Line {
    name: &'static str,
    nfe: usize,
    seconds: Vec<f64>,
    ms_per_forward: f64,
    /// Of the matrix products and of attention, in the mean of the forwards: as they were run.
    multiply_adds_per_forward: f64,
    /// The same by the arithmetic of `docs/caching.md`; of the adaptive cache.
    #[serde(skip_serializing_if = "Option::is_none")]
    reckoned_multiply_adds_per_forward: Option<f64>,
    kinds: BTreeMap<&'static str, Kind>,
    /// On a CUDA device: kernels and products, as nodes of the graphs of a pass.
    #[serde(skip_serializing_if = "Option::is_none")]
    launches: Option<KernelCounts>,
    /// All generated tokens, over the median of the seconds.
    tokens_per_second: f64,
    /// How many times faster than vanilla the whole decode is.
    ratio_to_vanilla: Option<f64>,
    /// How many times fewer multiply-adds than vanilla the whole decode takes.
    work_ratio_to_vanilla: Option<f64>,
    original_nfe: Option<usize>,
    original_ms_per_forward: Option<f64>,
    /// The original's milliseconds per forward over ours.
    speedup: Option<f64>,
}

/// Forwards of one kind. Times are medians over all rounds.
#[derive(Serialize)]
struct Kind {
    /// In one decode.
    count: usize,
    ms: f64,
    ms_min: f64,
    ms_max: f64,
    rows: f64,
    #[serde(rename = "multiply_adds")]
    macs: f64,
    /// Two operations a multiply-add, over the sum of the times.
    gflops: f64,
}

impl Kind {
    fn of<'a>(timings: impl IntoIterator<Item = &'a Timing>, kind: Forward, n: usize) -> Option<Kind> {
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
    /// `answer` is the original's last one, and `why` says why there is none, or no further one.
    pub fn new(setup: &Setup, subject: &Subject, runs: &[Run], answer: Option<Answer>, why: Option<String>) -> Summary {
        let vanilla = runs.iter().find(|r| r.mode == super::Mode::Vanilla);
        let work = |run: &Run| run.timings.iter().map(|t| t.macs).sum::<f64>() / run.seconds.len().max(1) as f64;
        let line = |run: &Run| {
            let seconds = median(run.seconds.clone()).max(1e-9);
            let ms_per_forward = 1000.0 * seconds / run.nfe.max(1) as f64;
            let kind = |kind: Forward| Some((kind.name(), Kind::of(&run.timings, kind, run.seconds.len())?));
            let forwards = run.nfe.max(1) as f64;
            // The arithmetic is that of a token a forward.
            let reckoned =
                adaptive_multiply_adds(setup, &run.mode.options(setup)).filter(|_| run.nfe == setup.gen_length);
            let measured = !run.original.is_empty();
            let original = measured.then(|| 1000.0 * median(run.original.clone()) / run.original_nfe.max(1) as f64);
            Line {
                name: run.mode.name(),
                nfe: run.nfe,
                seconds: run.seconds.clone(),
                ms_per_forward,
                multiply_adds_per_forward: work(run) / forwards,
                reckoned_multiply_adds_per_forward: reckoned.map(|all| all / forwards),
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
                Source::Random(shape) => Some(shape.name()),
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

    /// The tables for people.
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
        text += "\nTimes are medians; full to verify are ms of the forwards of that kind.\n\n";
        text += &table(&self.work_rows());
        text +=
            "\nMultiply-adds of products and attention in the mean of the forwards; reckoned: by docs/caching.md.\n\n";
        text += &table(&self.kind_rows(runs));
        let read = bytes(self.weight_bytes_per_forward);
        text += &format!("\nEvery forward reads {read} of weights at least once; GB/s is that over its time.\n");
        let launches = self.modes.iter().filter_map(|line| line.launches);
        if let Some(KernelCounts { layer, pass }) = launches.min_by_key(|launches| launches.pass) {
            text += &format!(
                "A block's pass is {pass} launches, its first layer {layer}: kernels and products, nodes of its graphs.\n"
            );
        }
        if let Some(Roofs { bytes_per_second, operations_per_second }) = self.roofs {
            let (reads, products) = (digits(bytes_per_second / 1e9), digits(operations_per_second / 1e12));
            text += &format!(
                "Measured in this run: reads {reads} GB/s, products of bf16 matrices {products} TFLOP/s. The floor is "
            );
            text += "the larger of what reading the weights and what the multiply-adds take at these.\n";
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

    /// What the modes compute.
    fn work_rows(&self) -> Vec<Vec<String>> {
        let head = ["mode", "G multiply-adds/forward", "reckoned", "vanilla's / these"];
        let mut rows = vec![head.map(String::from).to_vec()];
        let giga = |x: f64| format!("{:.3}", x / 1e9);
        for line in &self.modes {
            rows.push(vec![
                line.name.into(),
                giga(line.multiply_adds_per_forward),
                line.reckoned_multiply_adds_per_forward.map_or(String::new(), giga),
                line.work_ratio_to_vanilla.map_or(String::new(), |r| format!("{r:.2}")),
            ]);
        }
        rows
    }

    /// Forwards by kind, all modes together.
    fn kind_rows(&self, runs: &[Run]) -> Vec<Vec<String>> {
        let mut head = vec!["forward", "rows", "ms", "min-max", "G multiply-adds", "GFLOP/s", "GB/s"];
        if self.roofs.is_some() {
            head.extend(["floor ms", "x floor"]);
        }
        let mut rows = vec![head.into_iter().map(String::from).collect::<Vec<_>>()];
        for kind in Forward::ALL {
            let timings = runs.iter().flat_map(|r| &r.timings);
            let Some(k) = Kind::of(timings, kind, 1) else { continue };
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
                (torch, revision.as_deref().unwrap_or("of unknown revision"), stopped.unwrap_or_default())
            }
        };
        let head = ["mode", "NFE", "ms/forward", "original NFE", "original ms/forward", "original / ours"];
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
        let place = if self.device == "cpu" { "in f32 on the CPU" } else { "in bf16 on the same device" };
        let random = if self.shape.is_some() { ", random weights of its own" } else { "" };
        format!("originals: Fast-dLLM {revision}, torch {torch} {place}{random}{stopped}\n\n{}", table(&rows))
    }
}

/// Three significant digits and more.
fn digits(x: f64) -> String {
    match x.abs() {
        x if x >= 100.0 => format!("{x:.0}"),
        x if x >= 10.0 => format!("{x:.1}"),
        x if x >= 1.0 => format!("{x:.2}"),
        x => format!("{x:.3}"),
    }
}
