//! Lists a GGUF file on standard error and writes all tensors that have a decoder to standard
//! output, as little-endian f32 one after another in file order: for comparing with another reader
//! (scripts/check-gguf.py).
//!
//! `cargo run --release -p bitnet-formats --example gguf_decode -- model.gguf > floats.bin`

use bitnet_formats::gguf::{GgufEntry, GgufHeader, decode, encode_header, has_decoder};
use std::error::Error;
use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write, stdout};

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args_os()
        .nth(1)
        .ok_or("usage: gguf_decode FILE")?;
    let mut file = File::open(path)?;
    let header = GgufHeader::read(&file, file.metadata()?.len())?;
    eprintln!(
        "version {}, alignment {}, data at {}",
        header.version, header.alignment, header.data_start
    );
    for (key, value) in &header.metadata {
        eprintln!("{key}\t{}\t{}", value.type_name(), value.preview(100));
    }
    let tensors: Vec<_> = header
        .tensors
        .iter()
        .map(|t| GgufEntry {
            name: t.name.clone(),
            shape: t.shape.clone(),
            ggml_type: t.ggml_type,
            len: t.len,
        })
        .collect();
    let encoded = encode_header(&header.metadata, &tensors, header.alignment)?;
    let mut original = vec![0; usize::try_from(header.data_start)?];
    file.rewind()?;
    file.read_exact(&mut original)?;
    let mut out = BufWriter::new(stdout().lock());
    for t in &header.tensors {
        eprintln!(
            "{}\t{:?}\t{}\t{}\t{}",
            t.name, t.shape, t.ggml_type, t.offset, t.len
        );
        if !has_decoder(t.ggml_type) {
            continue;
        }
        let mut bytes = vec![0; usize::try_from(t.len)?];
        file.seek(SeekFrom::Start(t.offset))?;
        file.read_exact(&mut bytes)?;
        let mut floats = vec![0.0; t.shape.iter().product()];
        decode(t.ggml_type, &bytes, &mut floats)?;
        for x in floats {
            out.write_all(&x.to_le_bytes())?;
        }
    }
    eprintln!(
        "header encoded again: {}",
        if encoded.bytes == original {
            "the same bytes"
        } else {
            "different bytes"
        }
    );
    Ok(out.flush()?)
}
