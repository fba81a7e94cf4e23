//! advance, between two forwards: 32 sequences in blocks of 32, and one of 2,048 positions with Dream's schedule; both with early stop.

mod gpu;

use dllm_kernels::sampling::QuotaSchedule;
use dllm_kernels::selftest::advance::{Passes, Shape};
use gpu::{Bench, L2};

fn main() {
    let Some(mut bench) = Bench::open("advance") else { return };
    let end_tokens = vec![7, 8];
    let shape = Shape {
        sequences: bench.size(32, 4),
        length: bench.size(1024, 64),
        block: 32,
        schedule: QuotaSchedule::Llada { steps: 32 },
        end_tokens: end_tokens.clone(),
        odd: false,
    };
    bench.case::<f32, _>("32 sequences", &[L2::Cold, L2::Warm], |stream| Passes::new(stream, shape));
    let length = bench.size(2048, 200);
    let schedule = QuotaSchedule::Dream(vec![0.25; 8]);
    let shape = Shape { sequences: 1, length, block: length / 2, schedule, end_tokens, odd: false };
    bench.case::<f32, _>("2048 positions", &[L2::Cold, L2::Warm], |stream| Passes::new(stream, shape));
}
