//! Which of the two groupings the tensors of type 42 have.

use bitnet_formats::gguf::{
    Error, GgmlType, GgufEntry, GgufHeader, GgufTensor, Value, encode_header,
};

/// A tensor of a file: name, shape, type, and the offset and bytes that it has.
struct Part(&'static str, &'static [usize], GgmlType);

/// The header of a file of these tensors, one after another with `Part`'s type as the writer's, and
/// the length of its data.
fn written(parts: &[Part], pairs: &[(String, Value)]) -> (Vec<u8>, u64) {
    let entries: Vec<GgufEntry> = parts
        .iter()
        .map(|Part(name, shape, ggml_type)| GgufEntry {
            name: (*name).into(),
            shape: shape.to_vec(),
            ggml_type: *ggml_type,
            len: ggml_type.tensor_bytes(shape).unwrap(),
        })
        .collect();
    let header = encode_header(pairs, &entries, 32).unwrap();
    (header.bytes, header.data_len)
}

fn read(header: &[u8], data_len: u64) -> Result<Vec<GgufTensor>, Error> {
    GgufHeader::read(header, header.len() as u64 + data_len).map(|header| header.tensors)
}

/// The tensors that are not plain floats: name, type, bytes.
fn types(tensors: &[GgufTensor]) -> Vec<(&str, GgmlType, u64)> {
    let low = tensors.iter().filter(|t| t.ggml_type != GgmlType::F32);
    low.map(|t| (t.name.as_str(), t.ggml_type, t.len)).collect()
}

fn model(q2: GgmlType) -> [Part; 4] {
    [
        Part("a", &[16, 256], q2),
        Part("norm", &[16], GgmlType::F32),
        // Too small to tell by itself.
        Part("small", &[1, 128], q2),
        Part("b", &[8, 1024], q2),
    ]
}

#[test]
fn offsets_tell() {
    let (header, data) = written(&model(GgmlType::Q2_0), &[]);
    let expected = [
        ("a", GgmlType::Q2_0, 4096 / 64 * 18),
        ("small", GgmlType::Q2_0, 36),
        ("b", GgmlType::Q2_0, 8192 / 64 * 18),
    ];
    assert_eq!(types(&read(&header, data).unwrap()), expected);
    let (header, data) = written(&model(GgmlType::Q2_0G128), &[]);
    let expected = [
        ("a", GgmlType::Q2_0G128, 4096 / 128 * 34),
        ("small", GgmlType::Q2_0G128, 34),
        ("b", GgmlType::Q2_0G128, 8192 / 128 * 34),
    ];
    assert_eq!(types(&read(&header, data).unwrap()), expected);
    // 42 in the file, whichever it is.
    let ids = header.windows(12).filter(|w| w[..4] == 42u32.to_le_bytes());
    assert!(ids.count() >= 3);
    assert_eq!(GgmlType::from_id(42), Some(GgmlType::Q2_0));
}

#[test]
fn a_last_tensor_without_padding_fits_too() {
    for q2 in [GgmlType::Q2_0, GgmlType::Q2_0G128] {
        let shape: &[usize] = &[5, 128 * 81];
        let (header, _) = written(&[Part("a", shape, q2)], &[]);
        let len = q2.tensor_bytes(shape).unwrap();
        assert_ne!(len % 32, 0);
        assert_eq!(types(&read(&header, len).unwrap()), [("a", q2, len)]);
        // Cut off: the error is about the file.
        let short = GgmlType::Q2_0G128.tensor_bytes(shape).unwrap() - 1;
        let error = read(&header, short).unwrap_err();
        assert!(matches!(error, Error::OutsideFile { .. }), "{error}");
    }
}

#[test]
fn rows_that_groups_of_128_cut_are_in_groups_of_64() {
    let (header, data) = written(&[Part("a", &[2, 64], GgmlType::Q2_0)], &[]);
    let tensors = read(&header, data).unwrap();
    assert_eq!(types(&tensors), [("a", GgmlType::Q2_0, 36)]);
}

#[test]
fn both_or_neither_is_an_error_with_both_sums() {
    // Another padding than that of either.
    let parts = model(GgmlType::Q2_0);
    let (header, data) = written(&parts, &[]);
    let error = read(&header, data + 320).unwrap_err().to_string();
    let sums = "all 3 tensors: [3492, 3298] bytes in groups of 64 and of 128";
    let place = "'b' from 1280 has room up to 3904, and ends at [3584, 3456]";
    for part in ["neither of them", sums, place] {
        assert!(error.contains(part), "{part}: {error}");
    }
    let (header, data) = written(&[Part("small", &[1, 128], GgmlType::Q2_0)], &[]);
    let error = read(&header, data).unwrap_err().to_string();
    for part in [
        "both of them",
        "[36, 34] bytes",
        "'small' from 0 has room up to 64",
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
}

#[test]
fn the_document_of_this_program_settles_small_tensors() {
    for (layout, q2) in [("q2_0", GgmlType::Q2_0), ("q2_0-g128", GgmlType::Q2_0G128)] {
        let document = format!("{{\"tensors\": {{\"x\": {{\"layout\": \"{layout}\"}}}}}}");
        let pairs = [("bitnet.document".into(), Value::String(document))];
        let (header, data) = written(&[Part("small", &[1, 128], q2)], &pairs);
        assert_eq!(read(&header, data).unwrap()[0].ggml_type, q2);
    }
}

#[test]
fn one_file_holds_one_of_them() {
    let entry = |name: &str, ggml_type: GgmlType| GgufEntry {
        name: name.into(),
        shape: vec![128],
        ggml_type,
        len: ggml_type.tensor_bytes(&[128]).unwrap(),
    };
    let entries = [entry("a", GgmlType::Q2_0), entry("b", GgmlType::Q2_0G128)];
    let error = encode_header(&[], &entries, 32).unwrap_err().to_string();
    assert!(error.contains("'a'") && error.contains("'b'"), "{error}");
    let entries = [entry("a", GgmlType::Q2_0), entry("b", GgmlType::Pq2_0)];
    assert!(encode_header(&[], &entries, 32).is_ok());
}
