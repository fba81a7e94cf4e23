//! The CPU, with activations rounded to bf16 wherever the device stores them: what the device computes, but for the order of
//! sums and the weights of attention, which the device rounds too. So it tells errors of the device from those of bf16.

use dllm_kernels::Result;
use dllm_kernels::backend::cpu::linear::Matrix;
use dllm_kernels::backend::cpu::{Cpu, attention};
use dllm_kernels::backend::{Backend, Heads, HostUnmask, Needs, Placement, Span, Tensor};
use dllm_kernels::oracle::rope;
use dllm_kernels::oracle::unmask::{Group, Unmask, Verdict, unmask};
use half::bf16;

fn round(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}

/// The backend. One per session.
#[derive(Default)]
pub struct Rounded {
    cpu: Cpu,
    angles: rope::Angles,
    tokens: Vec<u32>,
}

/// Activations, or logits, which stay f32.
pub struct Buffer {
    data: Vec<f32>,
    logits: bool,
}

/// Keys and values `[layers][positions, width]`.
pub struct Cache(Vec<[Vec<f32>; 2]>);

#[derive(Default)]
pub struct Rows {
    spans: Vec<Span>,
    tokens: Vec<usize>,
    scored: Vec<usize>,
}

impl Backend for Rounded {
    type Buffer = Buffer;
    type Matrix = Matrix;
    type Vector = Vec<f32>;
    type Cache = Cache;
    type Rows = Rows;

    fn matrix(&self, parts: Vec<Tensor>, biases: Vec<Tensor>) -> Result<Matrix> {
        self.cpu.matrix(parts, biases)
    }

    fn vector(&self, tensor: Tensor) -> Result<Vec<f32>> {
        self.cpu.vector(tensor)
    }

    fn prepare(&mut self, needs: &Needs, theta: f32) -> Result<()> {
        self.angles.extend(theta, needs.heads.head_dim, needs.longest);
        self.cpu.prepare(needs, theta)
    }

    fn buffer(&self, rows: usize, width: usize) -> Result<Buffer> {
        Ok(Buffer { data: self.cpu.buffer(rows, width)?, logits: false })
    }

    fn logits(&self, rows: usize, vocab_size: usize) -> Result<Buffer> {
        Ok(Buffer { data: self.cpu.logits(rows, vocab_size)?, logits: true })
    }

    fn cache(&self, layers: usize, positions: usize, width: usize) -> Result<Cache> {
        Ok(Cache((0..layers).map(|_| [(); 2].map(|()| vec![0.0; positions * width])).collect()))
    }

    fn rows(&self, _needs: &Needs) -> Result<Rows> {
        Ok(Rows::default())
    }

    fn write_tokens(&mut self, tokens: &[u32]) -> Result<()> {
        self.tokens = tokens.to_vec();
        Ok(())
    }

    fn place(&mut self, rows: &mut Rows, placement: &Placement) -> Result<()> {
        let Placement { spans, tokens, scored, .. } = *placement;
        *rows = Rows { spans: spans.to_vec(), tokens: tokens.to_vec(), scored: scored.to_vec() };
        Ok(())
    }

    fn embed(&mut self, table: &Matrix, rows: &Rows, out: &mut Buffer) -> Result<()> {
        for (index, row) in rows.tokens.iter().zip(out.data.chunks_exact_mut(table.cols())) {
            table.row_into(self.tokens[*index] as usize, row);
        }
        Ok(())
    }

    fn add_norm(
        &mut self,
        x: &mut Buffer,
        delta: Option<&Buffer>,
        weight: &Vec<f32>,
        eps: f32,
        out: &mut Buffer,
        rows: usize,
    ) -> Result<()> {
        let width = weight.len();
        for row in 0..rows {
            let row = row * width..(row + 1) * width;
            let x = &mut x.data[row.clone()];
            if let Some(delta) = delta {
                x.iter_mut().zip(&delta.data[row.clone()]).for_each(|(x, delta)| *x = round(*x + delta));
            }
            let mean = x.iter().map(|x| x * x).sum::<f32>() / width as f32;
            let scale = 1.0 / (mean + eps).sqrt();
            for ((out, x), weight) in out.data[row].iter_mut().zip(x).zip(weight) {
                *out = round(round(*x * scale) * weight);
            }
        }
        Ok(())
    }

    fn linear(&mut self, x: &Buffer, w: &Matrix, out: &mut Buffer, rows: usize) -> Result<()> {
        self.cpu.linear(&x.data, w, &mut out.data, rows)?;
        if !out.logits {
            out.data.iter_mut().for_each(|y| *y = round(*y));
        }
        Ok(())
    }

    fn rope(
        &mut self,
        qkv: &mut Buffer,
        heads: Heads,
        rows: &Rows,
        mut store: Option<(&mut Cache, usize)>,
    ) -> Result<()> {
        let (q, kv) = (heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim);
        let mut all = qkv.data.chunks_exact_mut(heads.qkv_width());
        for span in &rows.spans {
            for (position, row) in (span.start..span.end).zip(&mut all) {
                rope::rotate(&mut row[..q + kv], heads.head_dim, self.angles.at(position));
                row.iter_mut().for_each(|x| *x = round(*x));
                if let Some((Cache(layers), layer)) = &mut store {
                    let at = (span.cache_base + position) * kv;
                    layers[*layer][0][at..at + kv].copy_from_slice(&row[q..q + kv]);
                    layers[*layer][1][at..at + kv].copy_from_slice(&row[q + kv..]);
                }
            }
        }
        Ok(())
    }

    fn attention(
        &mut self,
        qkv: &Buffer,
        heads: Heads,
        rows: &Rows,
        reuse: Option<(&Cache, usize)>,
        out: &mut Buffer,
    ) -> Result<()> {
        let cached = reuse.map(|(Cache(layers), layer)| (&layers[layer][0][..], &layers[layer][1][..]));
        attention::attention(&qkv.data, heads, &rows.spans, cached, &mut out.data);
        out.data.iter_mut().for_each(|x| *x = round(*x));
        Ok(())
    }

    fn swiglu(&mut self, gate_up: &Buffer, width: usize, out: &mut Buffer, rows: usize) -> Result<()> {
        let rows = gate_up.data.chunks_exact(2 * width).zip(out.data.chunks_exact_mut(width)).take(rows);
        for (from, out) in rows {
            let (gate, up) = from.split_at(width);
            for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                *out = round(round(gate / (1.0 + (-gate).exp())) * up);
            }
        }
        Ok(())
    }

    fn gather(&mut self, x: &Buffer, rows: &Rows, width: usize, out: &mut Buffer) -> Result<()> {
        for (from, row) in rows.scored.iter().zip(out.data.chunks_exact_mut(width)) {
            row.copy_from_slice(&x.data[from * width..(from + 1) * width]);
        }
        Ok(())
    }

    fn read(&self, buffer: &Buffer, rows: usize, width: usize) -> Result<Vec<f32>> {
        Ok(buffer.data[..rows * width].to_vec())
    }
}

impl HostUnmask for Rounded {
    fn unmask(
        &mut self,
        logits: &mut Buffer,
        vocab_size: usize,
        groups: &[Group],
        how: &Unmask,
    ) -> Result<Vec<Verdict>> {
        unmask(&mut logits.data, vocab_size, groups, how)
    }
}
