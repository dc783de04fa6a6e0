//! `bitnet embed`: a vector for each text.

use crate::args::model::{EmbedArgs, EmbedFormat};
use crate::print::{Answer, Output, Table, note, without_bom};
use crate::progress::interrupt;
use anyhow::Context;
use bitnet_inference::{EmbedOptions, Embedder, EncodedText, Error, Normalization};
use serde_json::json;
use std::io::{IsTerminal, Read};
use std::sync::atomic::Ordering;

/// Texts that are computed between two looks at the interrupt flag.
const ROUND: usize = 64;

pub(crate) fn run(args: &EmbedArgs, out: &mut Output) -> anyhow::Result<Answer> {
    if args.format == EmbedFormat::Npy && !args.similarity && std::io::stdout().is_terminal() {
        anyhow::bail!("--format npy: expected a file or a pipe as stdout, got a terminal");
    }
    let texts = texts(args)?;
    let options = EmbedOptions {
        load: args.load.options()?,
        pooling: args.pooling,
        normalization: if args.no_normalize {
            Normalization::Never
        } else {
            Normalization::Model
        },
        prompt: args.prompt_name.clone(),
    };
    let embedder = Embedder::load_with(&args.model, &options)?;
    if !args.quiet.quiet {
        embedder.notes().iter().for_each(note);
    }
    let encoded = encode(args, &embedder, &texts)?;
    let vectors = vectors(&embedder, &encoded)?;
    if args.similarity {
        print_similarity(&vectors, out);
    } else {
        match args.format {
            EmbedFormat::Text => {
                for vector in &vectors {
                    let numbers: Vec<String> = vector.iter().map(f32::to_string).collect();
                    out.line(numbers.join(" "));
                }
            }
            EmbedFormat::Jsonl => {
                for (text, vector) in texts.iter().zip(&vectors) {
                    out.line(json!({"text": text, "embedding": vector}).to_string());
                }
            }
            EmbedFormat::Npy => out.bytes(npy(&vectors, embedder.dimensions())),
        }
    }
    let mut document = json!({
        "dimensions": embedder.dimensions(),
        "pooling": embedder.pooling().name(),
        "normalized": embedder.normalizes(),
        "max_tokens": embedder.max_tokens(),
        "tokens": encoded.iter().map(|text| text.full).collect::<Vec<_>>(),
    });
    if args.similarity {
        document["similarity"] = similarity(&vectors).into();
    } else {
        document["embeddings"] = vectors.into();
    }
    out.document(document);
    Ok(Answer::Yes)
}

/// The texts of the command line, or the lines of a file or of stdin.
fn texts(args: &EmbedArgs) -> anyhow::Result<Vec<String>> {
    if !args.texts.is_empty() {
        return Ok(args.texts.clone());
    }
    let file = args.file.as_deref().filter(|path| path.as_os_str() != "-");
    let (text, name) = match file {
        Some(path) => {
            let name = path.display().to_string();
            let text = std::fs::read_to_string(path)
                .map_err(|e| anyhow::anyhow!("cannot read {name}: {e}"))?;
            (text, name)
        }
        None => {
            let mut text = String::new();
            let read = std::io::stdin().lock().read_to_string(&mut text);
            read.context("cannot read texts from stdin")?;
            (text, "stdin".into())
        }
    };
    let texts: Vec<String> = without_bom(text, &name)
        .lines()
        .map(str::to_string)
        .collect();
    anyhow::ensure!(
        !texts.is_empty(),
        "{name}: expected a text in each line, got nothing"
    );
    Ok(texts)
}

/// The tokens of each text, with a note on those that are cut.
fn encode(
    args: &EmbedArgs,
    embedder: &Embedder,
    texts: &[String],
) -> anyhow::Result<Vec<EncodedText>> {
    let mut encoded = Vec::with_capacity(texts.len());
    for (i, text) in texts.iter().enumerate() {
        let text = embedder.encode(text);
        encoded.push(text.map_err(|e| anyhow::anyhow!("text {}: {e}", i + 1))?);
    }
    let cut = |text: &&(usize, &EncodedText)| text.1.full > text.1.tokens.len();
    let all: Vec<(usize, &EncodedText)> = (1..).zip(&encoded).collect();
    let all: Vec<&(usize, &EncodedText)> = all.iter().filter(cut).collect();
    if let Some((i, text)) = all.first()
        && !args.quiet.quiet
    {
        let more = match all.len() - 1 {
            0 => String::new(),
            n => format!(", and {n} more texts"),
        };
        note(format!(
            "text {i} is cut to {} of its {} tokens, the most that the model takes{more}",
            text.tokens.len(),
            text.full
        ));
    }
    Ok(encoded)
}

/// The vectors, text by text of similar length, until interrupted.
fn vectors(embedder: &Embedder, encoded: &[EncodedText]) -> anyhow::Result<Vec<Vec<f32>>> {
    let interrupt = interrupt();
    let mut vectors = Vec::with_capacity(encoded.len());
    for round in encoded.chunks(ROUND) {
        if interrupt.load(Ordering::Relaxed) {
            return Err(Error::Interrupted.into());
        }
        let tokens: Vec<&[u32]> = round.iter().map(|text| &text.tokens[..]).collect();
        vectors.extend(embedder.embed_tokens(&tokens)?);
    }
    Ok(vectors)
}

/// The cosine of the angle between each two vectors; 0 beside a vector of zeros.
fn similarity(vectors: &[Vec<f32>]) -> Vec<Vec<f64>> {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        let products = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
        products.sum()
    };
    let lengths: Vec<f64> = vectors.iter().map(|v| dot(v, v).sqrt()).collect();
    let cosine = |i: usize, j: usize| match lengths[i] * lengths[j] {
        0.0 => 0.0,
        product => dot(&vectors[i], &vectors[j]) / product,
    };
    let all = 0..vectors.len();
    all.clone()
        .map(|i| all.clone().map(|j| cosine(i, j)).collect())
        .collect()
}

fn print_similarity(vectors: &[Vec<f32>], out: &mut Output) {
    let numbers: Vec<String> = (1..=vectors.len()).map(|i| i.to_string()).collect();
    let mut head = vec!["text"];
    head.extend(numbers.iter().map(String::as_str));
    let mut table = Table::new(&head);
    for (number, row) in numbers.iter().zip(similarity(vectors)) {
        let mut cells = vec![number.clone()];
        cells.extend(row.iter().map(|cosine| format!("{cosine:.4}")));
        table.row(cells);
    }
    out.table(&table);
}

/// A NumPy array of format 1.0, `[texts, dimensions]`, f32.
fn npy(vectors: &[Vec<f32>], dimensions: usize) -> Vec<u8> {
    let shape = format!("({}, {dimensions})", vectors.len());
    let dict = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}");
    // The header with its ten bytes before it and a line feed is a multiple of 64 bytes.
    let len = (dict.len() + 11).next_multiple_of(64) - 10;
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((len as u16).to_le_bytes());
    bytes.extend(format!("{dict:<0$}\n", len - 1).bytes());
    bytes.extend(vectors.iter().flatten().flat_map(|x| x.to_le_bytes()));
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_npy_header_is_aligned() {
        let bytes = npy(&[vec![1.0, 2.0], vec![3.0, 4.0]], 2);
        assert_eq!(bytes.len() % 64, 16);
        assert!(
            bytes[10..].starts_with(b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2), }")
        );
        assert_eq!(bytes[bytes.len() - 17], b'\n');
    }

    #[test]
    fn cosines_of_known_vectors() {
        let got = similarity(&[vec![3.0, 0.0], vec![1.0, 1.0], vec![0.0, 0.0]]);
        assert!((got[0][1] - 0.5f64.sqrt()).abs() < 1e-12);
        assert_eq!((got[0][0], got[2][0], got[2][2]), (1.0, 0.0, 0.0));
    }
}
