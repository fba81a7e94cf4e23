//! `cargo run --release --example answer`: answers a question with the library. Run it in the root of the repository.

use dllm_kernels::tokenizer::Tokenizer;
use dllm_kernels::{CacheMode, Generator, Model, Policy};

const QUESTION: &str =
    "Mia has 6 boxes with 8 pens in each box. She buys 12 more pens. How many pens does Mia have now?";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = std::path::Path::new("models/tiny-math");
    let model = Model::open(dir)?;
    let tokenizer = Tokenizer::open(dir, model.config().vocab_size)?.ok_or("no tokenizer")?;
    let prompt = tokenizer.encode(&tokenizer.chat(QUESTION)?, false)?; // token ids
    let output = Generator::new(&model)
        .gen_length(64)
        .cache(CacheMode::Dual)
        .policy(Policy::Threshold(0.9))
        .end_tokens(tokenizer.end_tokens())
        .generate(&[prompt])?; // one list of ids per prompt, one list of tokens per answer
    println!("{}\n({} forward passes)", tokenizer.decode(output.text_tokens(0))?, output.nfe);
    Ok(())
}
