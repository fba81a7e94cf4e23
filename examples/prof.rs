use dllm_kernels::backend::cpu::linear::*;
use dllm_kernels::*;
fn main() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let c = Config::shape("mid").unwrap();
    let w = model::Weights::random(&c, 0).unwrap();
    let ms: Vec<Matrix> = (0..8)
        .map(|l| {
            Matrix::new(
                vec![w.get(&format!("model.transformer.blocks.{l}.ff_proj.weight"), &[3072, 1024]).unwrap()],
                vec![],
            )
        })
        .collect();
    pool.install(|| {
        for rows in [16, 32, 64, 128, 256] {
            let x = vec![0.5f32; rows * 1024];
            let mut o = vec![0.0; rows * 3072];
            let mut p = vec![0.0; packed_len(rows, 1024)];
            let mut best = f64::MAX;
            let reps = 60;
            for _ in 0..reps {
                for m in &ms {
                    let t = std::time::Instant::now();
                    linear(&x, m, &mut o, rows, &mut p);
                    best = best.min(t.elapsed().as_secs_f64());
                }
            }
            println!(
                "rows {rows} best {:.3} ms {:.1} GF/s",
                best * 1e3,
                2.0 * rows as f64 * 1024. * 3072. / best / 1e9
            );
        }
    });
}
