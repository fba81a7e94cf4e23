//! Asynchronous copies to the device through pinned memory.

use crate::error::Result;
use crate::gpu::{Buffer, Event, Pinned, Stream};
use crate::tensor::{Dtype, Tensor};
use bytemuck::Pod;
use half::bf16;
use rayon::prelude::*;

/// Pinned source buffer of asynchronous copies. A write first waits for the previous copy, which has usually completed.
pub struct Staging<T> {
    memory: Pinned<T>,
    copied: Option<Event>,
}

impl<T: Pod> Staging<T> {
    /// Allocates pinned memory for `len` elements, for copies on `stream`'s device.
    pub fn new(stream: &Stream, len: usize) -> Result<Staging<T>> {
        Ok(Staging { memory: Pinned::new(stream.device(), len.max(1))?, copied: None })
    }

    /// Waits until the previous copy has completed, and returns the memory for writing.
    fn wait_until_free(&mut self) -> Result<&mut Pinned<T>> {
        if let Some(event) = self.copied.take() {
            event.wait()?;
        }
        Ok(&mut self.memory)
    }

    /// Enqueues a copy of the first `count` elements of the memory to the elements of `to` from `offset` on.
    fn send(&mut self, to: &mut Buffer<T>, offset: usize, count: usize) -> Result<()> {
        // SAFETY: `wait_until_free` and `drop` wait for the event before the memory is written or freed.
        unsafe { to.write_pinned(offset, &self.memory, 0, count) }?;
        match to.stream().record() {
            Ok(event) => self.copied = Some(event),
            // Without an event, only synchronising the stream makes sure that the copy has completed.
            Err(error) => return to.stream().synchronize().and(Err(error)),
        }
        Ok(())
    }

    /// Enqueues a copy of `data` to the first elements of `to`, on the stream of `to`.
    pub fn write(&mut self, to: &mut Buffer<T>, data: &[T]) -> Result<()> {
        self.wait_until_free()?.write(0, data);
        self.send(to, 0, data.len())
    }
}

impl<T> Drop for Staging<T> {
    fn drop(&mut self) {
        if let Some(event) = self.copied.take() {
            let _ = event.wait(); // an error belongs to work whose result was never read
        }
    }
}

/// Elements of a staging buffer for weights: 32 MiB of bf16.
const CHUNK: usize = 16 << 20;

/// Uploads weights as bf16 through two staging buffers. While one chunk is copied to the device, the next is read from the
/// file and converted.
pub struct Uploader {
    staging: [Staging<bf16>; 2],
    next: usize,
    /// Called after each chunk with the bytes uploaded so far.
    progress: Box<dyn FnMut(u64) + Send>,
    bytes: u64,
}

impl Uploader {
    /// Allocates the staging buffers. `progress` is called after each chunk with the bytes uploaded so far.
    pub fn new(stream: &Stream, progress: Box<dyn FnMut(u64) + Send>) -> Result<Uploader> {
        let staging = [Staging::new(stream, CHUNK)?, Staging::new(stream, CHUNK)?];
        Ok(Uploader { staging, next: 0, progress, bytes: 0 })
    }

    /// Enqueues copies of all elements of `tensor` to the elements of `to` from `offset` on.
    pub fn upload(&mut self, tensor: &Tensor, to: &mut Buffer<bf16>, offset: usize) -> Result<()> {
        let size = tensor.dtype().size();
        for (i, chunk) in tensor.bytes().chunks(CHUNK * size).enumerate() {
            let staging = &mut self.staging[self.next];
            self.next = 1 - self.next;
            let count = chunk.len() / size;
            let out = &mut staging.wait_until_free()?.as_mut_slice()[..count];
            const PIECE: usize = 1 << 18;
            out.par_chunks_mut(PIECE).zip(chunk.par_chunks(PIECE * size)).for_each(|(out, bytes)| {
                narrow(tensor.dtype(), bytes, out);
            });
            staging.send(to, offset + i * CHUNK, count)?;
            self.bytes += 2 * count as u64;
            (self.progress)(self.bytes);
        }
        Ok(())
    }
}

/// Converts the elements `bytes` of type `dtype` to bf16, rounded to nearest.
fn narrow(dtype: Dtype, bytes: &[u8], out: &mut [bf16]) {
    if dtype == Dtype::Bf16 && cfg!(target_endian = "little") {
        bytemuck::cast_slice_mut::<bf16, u8>(out).copy_from_slice(bytes);
        return;
    }
    let mut wide = [0.0f32; 256];
    for (bytes, out) in bytes.chunks(256 * dtype.size()).zip(out.chunks_mut(256)) {
        let wide = &mut wide[..out.len()];
        dtype.widen(bytes, wide);
        for (out, x) in out.iter_mut().zip(&*wide) {
            *out = bf16::from_f32(*x);
        }
    }
}
