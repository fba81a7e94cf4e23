//! Shared code of the kernel benches: the device, its measured read bandwidth, repetitions with a cold or a warm L2 cache, and the
//! printed and recorded results, which `docs/benchmarks.md` explains.

// Each bench is a program of its own, and none uses all of it.
#![allow(dead_code)]

use criterion::{BenchmarkId, Criterion, SamplingMode};
use dllm_kernels::gpu::{Buffer, Device, Stream};
use dllm_kernels::ops::read_bandwidth;
use dllm_kernels::selftest::{Case, Float, Rows, broken};
use dllm_kernels::{Error, Result};
use std::fs::OpenOptions;
use std::io::Write;
use std::time::Duration;

/// Maximum number of repetitions in one call from criterion, which plans them by the device's time. A repetition with eviction and
/// reset can take a hundred times as long.
const MAX_REPETITIONS: u64 = 20;
const CSV_COLUMNS: &str =
    "op,case,dtype,l2,bytes,median_us,min_us,max_us,gb_per_s,roof_gb_per_s,share_of_roof,rival,rival_us";

/// Contents of the L2 cache at the start of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L2 {
    /// 256 MiB of other data.
    Cold,
    /// The data of the same launch, which has just run.
    Warm,
}

/// A device with its measured read bandwidth, and the recorder of results.
pub struct Bench {
    op: &'static str,
    stream: Stream,
    soft: bool,
    evicting: Buffer<u8>,
    sink: Buffer<u32>,
    roof_gb_per_s: f64,
    criterion: Criterion,
}

/// Times of repetitions in microseconds.
struct Times(Vec<f64>);

impl Times {
    fn median(&mut self) -> f64 {
        self.0.sort_by(f64::total_cmp);
        let n = self.0.len();
        (self.0[(n - 1) / 2] + self.0[n / 2]) / 2.0
    }
}

impl Bench {
    /// Opens the first CUDA device, or the CUDA emulator with `DLLM_TEST_DEVICE=soft`. Prints a note and returns `None` without one.
    pub fn open(op: &'static str) -> Option<Bench> {
        let soft = std::env::var("DLLM_TEST_DEVICE").is_ok_and(|device| device == "soft");
        if soft {
            softgpu::install();
            println!("software device: times mean nothing. Shapes are shrunk, and no number is recorded.");
        }
        match Device::open(0) {
            Ok(device) => Some(Bench::new(op, &device, soft).unwrap_or_else(|error| panic!("{op}: {error}"))),
            Err(error) => {
                println!("{op}: no CUDA device: not measured ({error})");
                None
            }
        }
    }

    fn new(op: &'static str, device: &Device, soft: bool) -> Result<Bench> {
        let stream = device.stream()?;
        device.preload()?;
        let criterion = Criterion::default()
            .sample_size(10)
            .warm_up_time(Duration::from_millis(20))
            .measurement_time(Duration::from_millis(100))
            .nresamples(2000)
            .configure_from_args();
        let evicting = stream.zeros(if soft { 64 << 10 } else { 256 << 20 })?;
        let sink = stream.zeros(1)?;
        let mut bench = Bench { op, soft, evicting, sink, roof_gb_per_s: f64::NAN, criterion, stream };
        bench.measure_roof(device)?;
        Ok(bench)
    }

    /// Measures the read bandwidth over 2 GiB, and the time between two consecutive events, which is the minimum for any launch.
    fn measure_roof(&mut self, device: &Device) -> Result<()> {
        let bytes = if self.soft { 1 << 20 } else { 2 << 30 };
        let repetitions = if self.soft { 2 } else { 30 };
        let source = self.stream.zeros::<u8>(bytes)?;
        let (mut reads, mut empty) = (Times(Vec::new()), Times(Vec::new()));
        for repetition in 0..repetitions + 5 {
            self.evict()?;
            let read = self.stream.time_ms(|| read_bandwidth::launch(&self.stream, &source, &mut self.sink))?;
            self.evict()?;
            let nothing = self.stream.time_ms(|| Ok(()))?;
            if repetition >= 5 || self.soft {
                reads.0.push(f64::from(read) * 1e3);
                empty.0.push(f64::from(nothing) * 1e3);
            }
        }
        self.roof_gb_per_s = bytes as f64 / reads.median() / 1e3;
        println!("{}, compute capability {:?}", device.name()?, device.capability());
        self.report("roof", &format!("{} MiB", bytes >> 20), "u8", "cold", bytes, reads);
        self.report("events", "nothing between", "", "cold", 0, empty);
        Ok(())
    }

    /// Returns `real`, or `small` on the CUDA emulator.
    pub fn size(&self, real: usize, small: usize) -> usize {
        if self.soft { small } else { real }
    }

    /// Creates, checks and measures a case. `name` has the real shape, also on the emulator.
    pub fn case<T: Float, C: Case>(&mut self, name: &str, l2: &[L2], make: impl FnOnce(&Stream) -> Result<C>) {
        let mut make = Some(make);
        let mut case = None;
        for l2 in l2 {
            let run = self.run::<T, C>(name, *l2, &mut case, &mut make);
            run.unwrap_or_else(|error| panic!("{} {name}: {error}", self.op));
        }
    }

    fn run<T: Float, C: Case>(
        &mut self,
        name: &str,
        l2: L2,
        case: &mut Option<C>,
        make: &mut Option<impl FnOnce(&Stream) -> Result<C>>,
    ) -> Result<()> {
        let (op, dtype, warmth) = (self.op, T::NAME, ["cold", "warm"][l2 as usize]);
        // Moved out because the closure below borrows `self`.
        let mut criterion = std::mem::take(&mut self.criterion);
        let (mut times, mut failed) = (Times(Vec::new()), None);
        let mut measure = |iterations: u64| -> Result<Duration> {
            if let Some(make) = make.take() {
                let made = case.insert(make(&self.stream)?);
                made.launch()?;
                if let Some(wrong) = broken(&made.check(Rows::Few)?) {
                    return Err(Error::Unavailable(format!("wrong result: {wrong}")));
                }
            }
            let case = case.as_mut().ok_or_else(|| Error::Unavailable("the case failed before".into()))?;
            // At least 1: criterion keeps doubling the number, which may overflow to 0.
            let repetitions = iterations.clamp(1, if self.soft { 1 } else { MAX_REPETITIONS });
            let mut sum = 0.0;
            for _ in 0..repetitions {
                let us = self.time_us(case, l2)?;
                times.0.push(us);
                sum += us;
            }
            Ok(Duration::from_secs_f64((sum / repetitions as f64 * iterations.max(1) as f64).max(0.01) / 1e6))
        };
        let mut group = criterion.benchmark_group(op);
        group.sampling_mode(SamplingMode::Flat);
        group.bench_function(BenchmarkId::from_parameter(format!("{name} {dtype} {warmth}")), |b| {
            b.iter_custom(|iterations| {
                measure(iterations).unwrap_or_else(|error| {
                    failed.get_or_insert(error);
                    Duration::from_secs(1)
                })
            })
        });
        group.finish();
        self.criterion = criterion;
        if let Some(error) = failed {
            return Err(error);
        }
        // Empty when the command line selected other cases.
        if let (false, Some(case)) = (times.0.is_empty(), case) {
            if case.flops() > 0 {
                let tflops = case.flops() as f64 / times.median() / 1e6;
                let soft = if self.soft { " [CUDA emulator]" } else { "" };
                println!("{op} {name} {dtype} {warmth}: {tflops:.1} TFLOP/s{soft}");
            }
            self.report(op, name, dtype, warmth, case.bytes(), times);
        }
        Ok(())
    }

    /// Times one repetition. The device evicts the L2 cache while the host enqueues the launch, so the launch does not wait for the host.
    fn time_us(&mut self, case: &mut impl Case, l2: L2) -> Result<f64> {
        case.reset()?;
        self.evict()?;
        if l2 == L2::Warm {
            case.launch()?;
            case.reset()?;
        }
        Ok(f64::from(self.stream.time_ms(|| case.launch())?) * 1e3)
    }

    /// Evicts the L2 cache by reads. Writes would leave dirty lines, whose write-back would cost the next launch bandwidth.
    fn evict(&mut self) -> Result<()> {
        read_bandwidth::launch(&self.stream, &self.evicting, &mut self.sink)
    }

    /// Prints a line and appends one to the file `DLLM_BENCH_CSV`.
    fn report(&self, op: &str, case: &str, dtype: &str, l2: &str, bytes: usize, mut times: Times) {
        let median = times.median();
        let (min, max) = (times.0[0], times.0[times.0.len() - 1]);
        let gb_per_s = bytes as f64 / median / 1e3;
        let share = gb_per_s / self.roof_gb_per_s;
        let spread = format!("{median:.2} us ({min:.2} to {max:.2}, {} runs)", times.0.len());
        let megabytes = bytes as f64 / 1e6;
        println!(
            "{op} {case} {dtype} {l2}: {megabytes:.2} MB, {spread}, {gb_per_s:.0} GB/s, {:.1} % of the roof of {:.0} GB/s{}",
            share * 100.0,
            self.roof_gb_per_s,
            if self.soft { " [CUDA emulator]" } else { "" }
        );
        let Some(path) = std::env::var_os("DLLM_BENCH_CSV").filter(|path| !path.is_empty()) else { return };
        let numbers = if self.soft {
            ",,,,,".into()
        } else {
            format!("{median:.3},{min:.3},{max:.3},{gb_per_s:.1},{:.1},{share:.4}", self.roof_gb_per_s)
        };
        let line = format!("{op},{case},{dtype},{l2},{bytes},{numbers},,\n");
        append(&path, &line).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}

fn append(path: &std::ffi::OsStr, line: &str) -> std::io::Result<()> {
    let mut file = OpenOptions::new().create(true).append(true).open(path)?;
    let columns = if file.metadata()?.len() == 0 { format!("{CSV_COLUMNS}\n") } else { String::new() };
    file.write_all((columns + line).as_bytes())
}
