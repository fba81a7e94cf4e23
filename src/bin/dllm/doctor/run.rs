//! Sequence of the checks (build, machine, peak rates, ops) and their report.

use super::Doctor;
use super::machine::{Build, Loads, Machine, NEEDED, modules, modules_text};
use crate::output::{print, print_json};
use crate::report::count;
use dllm_kernels::gpu::{Buffer, Device, Stream, blas};
use dllm_kernels::ops::read_bandwidth;
use dllm_kernels::selftest::{self, Case, Entry, Rows, broken, number};
use dllm_kernels::{Error, Result};
use serde::Serialize;

/// Bytes read before each timed launch to evict L2, several times its size.
const EVICTING_BYTES: usize = 256 << 20;
/// Bytes read to measure the bandwidth, if the device has them free.
const ROOF_BYTES: usize = 2 << 30;
const ROOF_REPETITIONS: usize = 30;
/// Rows, columns and inner size of the product that measures the rate of products.
const PRODUCT_SIZE: usize = 8192;
const PRODUCT_REPETITIONS: usize = 10;
/// Timed launches of an op.
const REPETITIONS: usize = 20;

/// Report of all checks, as `--json` prints it.
#[derive(Serialize)]
struct Report {
    build: Build,
    machine: Option<Machine>,
    device: Option<usize>,
    /// Set on the CUDA emulator, where nothing is timed.
    software: bool,
    modules: Vec<Loads>,
    read_gb_per_s: Option<f64>,
    matrix_tflops: Option<f64>,
    ops: Vec<Row>,
    verdict: &'static str,
    error: Option<String>,
}

/// Result of an op at one shape.
#[derive(Serialize)]
struct Row {
    op: &'static str,
    shape: String,
    dtype: &'static str,
    /// Comparison with the largest error relative to its bound.
    measure: Option<&'static str>,
    /// null for NaN.
    error: Option<f64>,
    bound: Option<f64>,
    bytes: Option<usize>,
    /// Time with cold L2, by events of the device; `None` on the CUDA emulator.
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
    let show = |text: &str| if args.json { Ok(()) } else { print(text) };
    show(&report.build.text())?;
    let machine = Machine::this().map_err(|error| Error::NoDevice(format!("{error}; {NEEDED}")))?;
    show(&machine.text())?;
    let (devices, is_software) = (machine.count(), machine.is_software(args.device));
    report.machine = Some(machine);
    if devices == 0 {
        return Err(Error::NoDevice(format!("expected a CUDA device, found none; {NEEDED}")));
    }
    if args.device >= devices {
        let expected = format!("a device from 0 to {}", devices - 1);
        return Err(Error::argument("device", expected, args.device));
    }
    (report.device, report.software) = (Some(args.device), is_software);
    let device = Device::open(args.device)?;
    report.modules = modules(device.capability());
    show(&format!("\ndevice {}\n{}", args.device, modules_text(&report.modules)))?;
    if is_software {
        show("This is a CUDA emulator: results are checked, times are meaningless and left out.\n")?;
    }

    let mut bench = Bench::new(&device, is_software)?;
    if Device::supports_timing()? {
        bench.measure_roofs(&device, report);
    } else {
        show("times    not measured: they need a driver of 570 or later\n")?;
    }
    let roof =
        |value: Option<f64>, unit: &str| value.map_or("not measured".into(), |value| format!("{value:.1} {unit}"));
    let (reads, products) = (roof(report.read_gb_per_s, "GB/s"), roof(report.matrix_tflops, "TFLOP/s"));
    show(&format!("roofs    reads {reads}, products of bf16 into f32 {products}\n\n"))?;
    show(&head(is_software))?;
    for row in &report.ops {
        show(&row.text(is_software))?;
    }
    for entry in selftest::entries(args.small || is_software) {
        let row = bench.row(&entry);
        show(&row.text(is_software))?;
        report.ops.push(row);
    }

    let wrong: Vec<&Row> = report.ops.iter().filter(|row| row.verdict != "ok").collect();
    if wrong.is_empty() {
        return show(&format!("\nall ok: {}\n", count(report.ops.len(), "check")));
    }
    let names: Vec<_> = wrong.iter().map(|row| format!("{} ({})", row.op, row.shape)).collect();
    let of = count(report.ops.len(), "check");
    Err(Error::Unavailable(format!("{} of {of} failed: {}", wrong.len(), names.join(", "))))
}

/// Device under test, with its measured bandwidth.
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

    /// Measures both peak rates. A failure becomes a row of the report. The CUDA emulator runs small sizes.
    fn measure_roofs(&mut self, device: &Device, report: &mut Report) {
        match self.measure_reads(device) {
            Ok(gb_per_s) => self.read_gb_per_s = gb_per_s,
            Err(error) => report.ops.push(Row::failed("read_bandwidth", "reads", "", &error)),
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

    /// Evicts L2 by reads. Writes would leave dirty lines, whose write-back takes bandwidth from the next launch.
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
        let bounds = case.check(Rows::All)?;
        // The first of equally large errors.
        let worst = bounds.iter().rev().max_by(|a, b| a.relative().total_cmp(&b.relative()));
        let message = broken(&bounds);
        Ok(Row {
            op: entry.op,
            shape: entry.shape.clone(),
            dtype: entry.dtype,
            measure: worst.map(|bound| bound.what),
            error: worst.map(|bound| bound.error),
            bound: worst.map(|bound| bound.bound),
            bytes: Some(case.bytes()),
            time: self.is_timed.then(|| self.time(case.as_mut())).transpose()?,
            verdict: if message.is_none() { "ok" } else { "wrong" },
            message,
        })
    }

    /// Times launches. While the device evicts L2 the host enqueues the launch, so that no launch waits for the host.
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

/// Returns minimum, median and maximum; NaN without times.
fn spread(times: &mut [f32]) -> [f64; 3] {
    times.sort_by(f32::total_cmp);
    let n = times.len();
    let nth = |i: usize| times.get(i).map_or(f64::NAN, |time| f64::from(*time));
    [nth(0), (nth(n.saturating_sub(1) / 2) + nth(n / 2)) / 2.0, nth(n.saturating_sub(1))]
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
        let cell = |x: Option<f64>| x.map_or("-".into(), number);
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
        let mut text = line([self.op, &self.shape, self.dtype, &cell(self.error), &cell(self.bound)], &time, &verdict);
        if let Some(message) = &self.message {
            text += &format!("    {message}\n");
        }
        text
    }
}

fn head(is_software: bool) -> String {
    let times = ["us, cold", "min to max", "MB", "GB/s", "% of roof"].map(String::from);
    let times = if is_software { String::new() } else { columns(times) };
    line(["op", "shape", "type", "error", "bound"], &times, "verdict")
}

/// Formats a line of the table. Columns have fixed widths, so that each row is printed when it is known.
fn line([op, shape, dtype, error, bound]: [&str; 5], times: &str, verdict: &str) -> String {
    format!("{op:<14}  {shape:<43}  {dtype:<4}  {error:>7}  {bound:>7}{times}  {verdict}\n")
}

fn columns([median, spread, bytes, rate, share]: [String; 5]) -> String {
    format!("  {median:>9}  {spread:>18}  {bytes:>8}  {rate:>6}  {share:>9}")
}
