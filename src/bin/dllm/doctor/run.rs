//! The order of things: build, machine, roofs, ops; and what is printed of them.

use super::Doctor;
use super::case::{Case, Entry};
use super::machine::{Build, Loads, Machine, NEEDED, modules, modules_text};
use super::ops;
use crate::args::argument;
use crate::output::{print, print_json};
use crate::report::count;
use dllm_kernels::gpu::{Buffer, Device, Stream, blas};
use dllm_kernels::ops::read_bandwidth;
use dllm_kernels::{Error, Result};
use serde::Serialize;

/// Bytes that are read before each timed launch, several times an L2 cache.
const EVICTING_BYTES: usize = 256 << 20;
/// Bytes whose reading is the roof, where the device has as many to spare.
const ROOF_BYTES: usize = 2 << 30;
const ROOF_REPETITIONS: usize = 30;
/// Rows, columns and inner size of the product whose rate is the roof of products.
const PRODUCT_SIZE: usize = 8192;
const PRODUCT_REPETITIONS: usize = 10;
/// Timed launches of an op.
const REPETITIONS: usize = 20;

/// All that was found; `--json` prints it.
#[derive(Serialize)]
struct Report {
    build: Build,
    machine: Option<Machine>,
    device: Option<usize>,
    /// Whether this is a device in software, on which nothing is timed.
    software: bool,
    modules: Vec<Loads>,
    read_gb_per_s: Option<f64>,
    matrix_tflops: Option<f64>,
    ops: Vec<Row>,
    verdict: &'static str,
    error: Option<String>,
}

/// What became of an op at one shape.
#[derive(Serialize)]
struct Row {
    op: &'static str,
    shape: String,
    dtype: &'static str,
    /// What is farthest from its bound.
    measure: Option<&'static str>,
    /// null where it is no number.
    error: Option<f64>,
    bound: Option<f64>,
    bytes: Option<usize>,
    /// Cold, by the device's events; null on the software device.
    #[serde(flatten)]
    time: Option<Time>,
    verdict: &'static str,
    message: Option<String>,
}

#[derive(Serialize)]
struct Time {
    median_us: f64,
    min_us: f64,
    max_us: f64,
    gb_per_s: f64,
    share_of_roof: f64,
}

/// Runs the command.
pub fn run(args: &Doctor) -> Result<()> {
    let mut report = Report {
        build: Build::this(),
        machine: None,
        device: None,
        software: false,
        modules: Vec::new(),
        read_gb_per_s: None,
        matrix_tflops: None,
        ops: Vec::new(),
        verdict: "ok",
        error: None,
    };
    let done = examine(args, &mut report);
    if let Err(error) = &done {
        if matches!(error, Error::Argument { .. }) {
            return done;
        }
        report.verdict = if report.ops.iter().any(|row| row.verdict != "ok") { "wrong" } else { "failed" };
        report.error = Some(error.to_string());
    }
    if args.json {
        print_json(&report)?;
    }
    done
}

fn examine(args: &Doctor, report: &mut Report) -> Result<()> {
    let say = |text: &str| if args.json { Ok(()) } else { print(text) };
    say(&report.build.text())?;
    let machine = Machine::this().map_err(|error| Error::NoDevice(format!("{error}; {NEEDED}")))?;
    say(&machine.text())?;
    let (devices, is_software) = (machine.count(), machine.is_software(args.device));
    report.machine = Some(machine);
    if devices == 0 {
        return Err(Error::NoDevice(format!("the driver has no device; {NEEDED}")));
    }
    if args.device >= devices {
        let expected = format!("a device from 0 to {}", devices - 1);
        return Err(argument("device", expected, args.device));
    }
    (report.device, report.software) = (Some(args.device), is_software);
    let device = Device::open(args.device)?;
    report.modules = modules(device.capability());
    say(&format!("\ndevice {}\n{}", args.device, modules_text(&report.modules)))?;
    if is_software {
        say("This is a device in software: results count, times would mean nothing and are left out.\n")?;
    }

    let mut bench = Bench::new(&device, is_software)?;
    if Device::supports_timing()? {
        bench.measure_roofs(&device, report);
    } else {
        say("times    not measured: this build needs a driver of 570 or later for them, or the feature cuda-12\n")?;
    }
    let roof =
        |value: Option<f64>, unit: &str| value.map_or("not measured".into(), |value| format!("{value:.1} {unit}"));
    let (reads, products) = (roof(report.read_gb_per_s, "GB/s"), roof(report.matrix_tflops, "TFLOP/s"));
    say(&format!("roofs    reads {reads}, products of bf16 into f32 {products}\n\n"))?;
    say(&head(is_software))?;
    for row in &report.ops {
        say(&row.text(is_software))?;
    }
    for entry in ops::all(args.small || is_software) {
        let row = bench.row(&entry);
        say(&row.text(is_software))?;
        report.ops.push(row);
    }

    let wrong: Vec<&Row> = report.ops.iter().filter(|row| row.verdict != "ok").collect();
    if wrong.is_empty() {
        return say(&format!("\nall ok: {}\n", count(report.ops.len(), "check")));
    }
    let names: Vec<_> = wrong.iter().map(|row| format!("{} ({})", row.op, row.shape)).collect();
    let of = count(report.ops.len(), "check");
    Err(Error::Unavailable(format!("{} of {of} did not pass: {}", wrong.len(), names.join(", "))))
}

/// The device, and what launches on it are measured against.
struct Bench {
    stream: Stream,
    is_software: bool,
    is_timed: bool,
    evicting: Buffer<u8>,
    sink: Buffer<u32>,
    read_gb_per_s: f64,
}

impl Bench {
    fn new(device: &Device, is_software: bool) -> Result<Bench> {
        let stream = device.stream()?;
        let evicting = stream.zeros(if is_software { 1 << 16 } else { EVICTING_BYTES })?;
        let sink = stream.zeros(1)?;
        let is_timed = !is_software && Device::supports_timing()?;
        Ok(Bench { stream, is_software, is_timed, evicting, sink, read_gb_per_s: f64::NAN })
    }

    /// Both roofs; one that cannot be measured is a row of the report. The software device runs them too, small.
    fn measure_roofs(&mut self, device: &Device, report: &mut Report) {
        match self.measure_reads(device) {
            Ok(gb_per_s) => self.read_gb_per_s = gb_per_s,
            Err(error) => report.ops.push(Row::failed("roof", "reads", "", &error)),
        }
        report.read_gb_per_s = Some(self.read_gb_per_s).filter(|x| x.is_finite() && !self.is_software);
        let (size, repetitions) = if self.is_software { (64, 1) } else { (PRODUCT_SIZE, PRODUCT_REPETITIONS) };
        match blas::matrix_rate(device, size, repetitions) {
            Ok(rate) => report.matrix_tflops = Some(rate / 1e12).filter(|_| !self.is_software),
            Err(error) => report.ops.push(Row::failed("product", "roof", "bf16", &error)),
        }
    }

    fn measure_reads(&mut self, device: &Device) -> Result<f64> {
        let (free, _) = device.memory_bytes()?;
        let bytes = if self.is_software { 1 << 18 } else { (free / 4).min(ROOF_BYTES) / 16 * 16 };
        let repetitions = if self.is_software { 1 } else { ROOF_REPETITIONS };
        Ok(read_bandwidth::read_rate(&self.stream, bytes, repetitions)? / 1e9)
    }

    /// Reads, and does not write: lines to be written back would cost the next launch bandwidth.
    fn evict(&mut self) -> Result<()> {
        read_bandwidth::launch(&self.stream, &self.evicting, &mut self.sink)
    }

    fn row(&mut self, entry: &Entry) -> Row {
        self.measured(entry).unwrap_or_else(|error| Row::failed(entry.op, &entry.shape, entry.dtype, &error))
    }

    fn measured(&mut self, entry: &Entry) -> Result<Row> {
        let mut case = (entry.make)(&self.stream)?;
        case.launch()?;
        self.stream.synchronize()?;
        let measures = case.check()?;
        // The first of those that are as far.
        let worst = measures.iter().rev().max_by(|a, b| a.in_bounds().total_cmp(&b.in_bounds()));
        let broken: Vec<_> = measures.iter().filter(|measure| !measure.holds()).collect();
        let text = |m: &&super::case::Measure| format!("{}: {}, at most {}", m.what, number(m.error), number(m.bound));
        let message = broken.iter().map(text).collect::<Vec<_>>().join("; ");
        Ok(Row {
            op: entry.op,
            shape: entry.shape.clone(),
            dtype: entry.dtype,
            measure: worst.map(|measure| measure.what),
            error: worst.map(|measure| measure.error),
            bound: worst.map(|measure| measure.bound),
            bytes: Some(case.bytes()),
            time: self.is_timed.then(|| self.time(case.as_mut())).transpose()?,
            verdict: if broken.is_empty() { "ok" } else { "wrong" },
            message: (!broken.is_empty()).then_some(message),
        })
    }

    /// The device is busy evicting while the host puts in what follows, so no launch waits for the host.
    fn time(&mut self, case: &mut dyn Case) -> Result<Time> {
        let mut times = Vec::new();
        for _ in 0..REPETITIONS {
            case.reset()?;
            self.evict()?;
            times.push(self.stream.time_ms(|| case.launch())?);
        }
        let [min_us, median_us, max_us] = spread(&mut times).map(|ms| ms * 1e3);
        let gb_per_s = case.bytes() as f64 / median_us / 1e3;
        Ok(Time { median_us, min_us, max_us, gb_per_s, share_of_roof: gb_per_s / self.read_gb_per_s })
    }
}

/// Least, median, most.
fn spread(times: &mut [f32]) -> [f64; 3] {
    times.sort_by(f32::total_cmp);
    let n = times.len();
    let at = |i: usize| times.get(i).map_or(f64::NAN, |time| f64::from(*time));
    [at(0), (at(n.saturating_sub(1) / 2) + at(n / 2)) / 2.0, at(n.saturating_sub(1))]
}

impl Row {
    fn failed(op: &'static str, shape: &str, dtype: &'static str, error: &Error) -> Row {
        Row {
            op,
            shape: shape.into(),
            dtype,
            measure: None,
            error: None,
            bound: None,
            bytes: None,
            time: None,
            verdict: "failed",
            message: Some(error.to_string()),
        }
    }

    fn text(&self, is_software: bool) -> String {
        let shown = |x: Option<f64>| x.map_or("-".into(), number);
        let verdict = if self.verdict == "ok" { "ok".into() } else { self.verdict.to_uppercase() };
        let time = match &self.time {
            _ if is_software => String::new(),
            None => columns(["-"; 5].map(String::from)),
            Some(time) => columns([
                format!("{:.2}", time.median_us),
                format!("{:.2} to {:.2}", time.min_us, time.max_us),
                format!("{:.2}", self.bytes.unwrap_or(0) as f64 / 1e6),
                format!("{:.0}", time.gb_per_s),
                format!("{:.0}", time.share_of_roof * 100.0),
            ]),
        };
        let mut text =
            line([self.op, &self.shape, self.dtype, &shown(self.error), &shown(self.bound)], &time, &verdict);
        if let Some(message) = &self.message {
            text += &format!("    {message}\n");
        }
        text
    }
}

fn head(is_software: bool) -> String {
    let times = ["us, cold", "least to most", "MB", "GB/s", "% of roof"].map(String::from);
    let times = if is_software { String::new() } else { columns(times) };
    line(["op", "shape", "type", "error", "bound"], &times, "verdict")
}

/// Columns are of one width each, so that a row can be shown before the next is there.
fn line([op, shape, dtype, error, bound]: [&str; 5], times: &str, verdict: &str) -> String {
    format!("{op:<9}  {shape:<43}  {dtype:<4}  {error:>7}  {bound:>7}{times}  {verdict}\n")
}

fn columns([median, spread, bytes, rate, share]: [String; 5]) -> String {
    format!("  {median:>9}  {spread:>18}  {bytes:>8}  {rate:>6}  {share:>9}")
}

/// A short number.
fn number(x: f64) -> String {
    if x == x.round() && x.abs() < 1e6 { format!("{x}") } else { format!("{x:.1e}") }
}
