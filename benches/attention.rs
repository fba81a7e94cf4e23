//! attention: streaming (32 rows over a cache in three segments), full (all rows over all keys), lists with a quarter of the tiles;
//! and both forms for numbers of rows around the plan's switch from one to the other.

mod gpu;

use dllm_kernels::Result;
use dllm_kernels::gpu::{Buffer, Stream};
use dllm_kernels::ops::attention::{self, Attention, Form, Heads, KEY_TILE, QUERY_TILE, Rows, Segment, Tiles};
use dllm_kernels::reference::attention::attend;
use gpu::{Bench, Case, Float, L2, Random, assert_close, bytes_of, few};
use half::bf16;

/// A batch of sequences of one shape.
#[derive(Clone, Copy)]
struct Shape {
    heads: Heads,
    sequences: usize,
    /// Query rows per sequence.
    rows: usize,
    /// Keys per sequence in each segment.
    keys: [usize; 3],
    /// One of `every` key tiles is visited.
    every: usize,
    /// Form of the kernel; `None` is the plan's choice.
    form: Option<Form>,
}

impl Shape {
    fn visits(&self, key: usize) -> bool {
        (key / KEY_TILE).is_multiple_of(self.every)
    }

    /// Number of visited keys per sequence.
    fn visited(&self) -> usize {
        (0..self.keys.iter().sum()).filter(|key| self.visits(*key)).count()
    }

    fn width(&self) -> usize {
        self.heads.num_heads * self.heads.head_dim
    }

    fn kv_width(&self) -> usize {
        self.heads.num_kv_heads * self.heads.head_dim
    }
}

/// Keys and values of a segment.
struct Keys {
    k: Buffer<bf16>,
    v: Buffer<bf16>,
    start: Buffer<i32>,
    len: Buffer<i32>,
}

struct Sequences {
    stream: Stream,
    shape: Shape,
    splits: usize,
    q: Buffer<bf16>,
    cu_rows: Buffer<i32>,
    segments: [Keys; 3],
    tiles: Option<[Buffer<i32>; 2]>,
    out: Buffer<bf16>,
    workspace: Buffer<f32>,
}

impl Sequences {
    fn new(stream: &Stream, shape: Shape) -> Result<Sequences> {
        let Shape { heads, sequences, rows, keys, every, .. } = shape;
        let mut random = Random(1);
        let splits = attention::splits(rows, heads, stream.device().multiprocessors()?);
        let multiples = |n: usize, of: usize| -> Vec<i32> { (0..n as i32).map(|i| i * of as i32).collect() };
        let mut matrix = |rows: usize, width: usize| stream.upload(&random.floats::<bf16>(rows * width, 1.0));
        let mut segment = |keys: usize| -> Result<Keys> {
            Ok(Keys {
                k: matrix(sequences * keys, shape.kv_width())?,
                v: matrix(sequences * keys, shape.kv_width())?,
                start: stream.upload(&multiples(sequences, keys))?,
                len: stream.upload(&vec![keys as i32; sequences])?,
            })
        };
        let segments = [segment(keys[0])?, segment(keys[1])?, segment(keys[2])?];
        let list = multiples(keys.iter().sum::<usize>().div_ceil(KEY_TILE).div_ceil(every), every);
        let lists = sequences * rows.div_ceil(QUERY_TILE);
        let tiles = match every {
            1 => None,
            _ => Some([stream.upload(&multiples(lists + 1, list.len()))?, stream.upload(&list.repeat(lists))?]),
        };
        Ok(Sequences {
            stream: stream.clone(),
            shape,
            splits,
            q: matrix(sequences * rows, shape.width())?,
            cu_rows: stream.upload(&multiples(sequences + 1, rows))?,
            segments,
            tiles,
            out: stream.alloc(sequences * rows * shape.width())?,
            workspace: stream.alloc(attention::workspace_len(sequences * rows, heads, splits))?,
        })
    }
}

impl Case for Sequences {
    fn bytes(&self) -> usize {
        let Shape { sequences, rows, .. } = self.shape;
        let keys = bytes_of::<bf16>(sequences * self.shape.visited(), self.shape.kv_width());
        2 * keys + 2 * bytes_of::<bf16>(sequences * rows, self.shape.width())
    }

    fn flops(&self) -> u64 {
        let Shape { sequences, rows, .. } = self.shape;
        4 * (sequences * rows * self.shape.visited() * self.shape.width()) as u64
    }

    fn launch(&mut self) -> Result<()> {
        let Sequences { shape, segments, tiles, q, cu_rows, out, workspace, .. } = self;
        let matrix = |buffer, stride| Rows { buffer, first: 0, stride };
        let segments = segments.each_ref().map(|Keys { k, v, start, len }| {
            let (k, v) = (matrix(k, shape.kv_width()), matrix(v, shape.kv_width()));
            (!k.buffer.is_empty()).then_some(Segment { k, v, start: Some(start), len })
        });
        let arguments = Attention {
            heads: shape.heads,
            q: matrix(q, shape.width()),
            cu_rows,
            max_sequence_rows: shape.rows,
            segments,
            tiles: tiles.as_ref().map(|[offsets, indices]| Tiles { offsets, indices, per_head: false }),
            scale: 1.0 / (shape.heads.head_dim as f32).sqrt(),
            max_splits: self.splits,
            form: shape.form,
            out,
            lse: None,
            workspace,
        };
        attention::launch(&self.stream, arguments)
    }

    fn check(&self) -> Result<()> {
        let Shape { heads, sequences, rows, keys, .. } = self.shape;
        let Heads { num_heads, num_kv_heads, head_dim } = heads;
        let wide = |x: &[bf16]| -> Vec<f64> { x.iter().map(|x| f64::from(x.f32())).collect() };
        let (q, out) = (self.q.read()?, self.out.read()?);
        for (sequence, head) in [(0, 0), (sequences - 1, num_heads - 1)] {
            let kv = head / (num_heads / num_kv_heads) * head_dim;
            let mut keys_values = Vec::new();
            for (Keys { k, v, .. }, keys) in self.segments.iter().zip(keys) {
                let (k, v) = (k.read()?, v.read()?);
                for row in sequence * keys..(sequence + 1) * keys {
                    let at = row * self.shape.kv_width() + kv;
                    keys_values.push((wide(&k[at..at + head_dim]), wide(&v[at..at + head_dim])));
                }
            }
            let visited: Vec<(&[f64], &[f64])> = (0..keys_values.len())
                .filter(|key| self.shape.visits(*key))
                .map(|key| (&keys_values[key].0[..], &keys_values[key].1[..]))
                .collect();
            for row in few(rows) {
                let at = (sequence * rows + row) * self.shape.width() + head * head_dim;
                let scale = 1.0 / (head_dim as f64).sqrt();
                let (want, _) = attend(&wide(&q[at..at + head_dim]), &visited, scale);
                let largest = want.iter().fold(0.0f64, |most, x| most.max(x.abs()));
                let what = format!("sequence {sequence} row {row} head {head}");
                assert_close(&what, &wide(&out[at..at + head_dim]), &want, 0.0, 1e-2 * largest);
            }
        }
        Ok(())
    }
}

fn main() {
    let Some(mut bench) = Bench::open("attention") else { return };
    let llada = Heads { num_heads: 32, num_kv_heads: 32, head_dim: 128 };
    let dream = Heads { num_heads: 28, num_kv_heads: 4, head_dim: 128 };
    let few_heads = Heads { num_heads: 16, num_kv_heads: 16, head_dim: 128 };
    let streaming = [
        ("llada 1x32 32/32x128 1024 keys", llada, 1, 1024, 1),
        ("dream 1x32 28/4x128 1024 keys", dream, 1, 1024, 1),
        ("llada 1x32 32/32x128 4096 keys", llada, 1, 4096, 1),
        ("llada 4x32 32/32x128 1024 keys", llada, 4, 1024, 1),
        ("dream 8x32 28/4x128 4096 keys", dream, 8, 4096, 1),
        ("llada 1x32 32/32x128 16384 keys", llada, 1, 16384, 1),
        ("llada 1x32 32/32x128 a quarter of 16384 keys", llada, 1, 16384, 4),
    ];
    for (name, heads, sequences, keys, every) in streaming {
        let (sequences, rows, keys) = (bench.size(sequences, 1), bench.size(32, 8), bench.size(keys, 512));
        // A quarter of the keys outside the block are in the suffix.
        let suffix = (keys - rows) / 4;
        let shape = Shape { heads, sequences, rows, keys: [keys - rows - suffix, rows, suffix], every, form: None };
        bench.case::<bf16, _>(name, &[L2::Cold], |stream| Sequences::new(stream, shape));
    }
    let boundary = [
        ("dream 1x32 28/4x128 4096 keys", dream, 1, 32, 4096),
        ("dream 8x32 28/4x128 4096 keys", dream, 8, 32, 4096),
        ("dream 8x64 28/4x128 4096 keys", dream, 8, 64, 4096),
        ("llada 1x128 32/32x128 4096 keys", llada, 1, 128, 4096),
        ("llada 1x256 32/32x128 4096 keys", llada, 1, 256, 4096),
        ("llada 1x512 32/32x128 4096 keys", llada, 1, 512, 4096),
        ("llada 8x256 32/32x128 1024 keys", llada, 8, 256, 1024),
    ];
    for (name, heads, sequences, rows, keys) in boundary {
        let (sequences, rows, keys) = (bench.size(sequences, 1), bench.size(rows, 40), bench.size(keys, 512));
        for (form, form_name) in [(Form::Streaming, "streaming"), (Form::Full, "full")] {
            let shape = Shape { heads, sequences, rows, keys: [keys - rows, rows, 0], every: 1, form: Some(form) };
            let name = format!("{name}, form {form_name}");
            bench.case::<bf16, _>(&name, &[L2::Cold], |stream| Sequences::new(stream, shape));
        }
    }
    let full = [
        ("full 16x1024 16/16x128", 16, 1024, 1),
        ("full 8x2048 16/16x128", 8, 2048, 1),
        ("full 4x4096 16/16x128", 4, 4096, 1),
        ("full 4x4096 16/16x128 a quarter of the keys", 4, 4096, 4),
    ];
    for (name, sequences, length, every) in full {
        let (sequences, rows) = (bench.size(sequences, 1), bench.size(length, 300));
        let heads = Heads { num_heads: bench.size(16, 2), num_kv_heads: bench.size(16, 2), ..few_heads };
        let shape = Shape { heads, sequences, rows, keys: [0, rows, 0], every, form: None };
        bench.case::<bf16, _>(name, &[L2::Cold], |stream| Sequences::new(stream, shape));
    }
}
