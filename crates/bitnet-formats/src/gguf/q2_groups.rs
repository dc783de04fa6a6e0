//! Whether the tensors of type 42 are Q2_0 in groups of 64 values or of 128.
//!
//! Prism's fork wrote groups of 128 under the number that is Q2_0 with groups of 64 in llama.cpp.
//! The header does not say which. With the alignment a:
//!
//! ```text
//! end(64) = offset + ceil(n/64 · 18 / a) · a        end(128) = offset + ceil(n/128 · 34 / a) · a
//! ```
//!
//! The size is the one for which every tensor of the type ends where the next tensor begins, or where
//! the file ends. Tensors of a few hundred values may fit both; of a file of this program its
//! document then says which.

use super::GgmlType;
use super::error::{Error, Result};
use super::reader::GgufTensor;
use super::value::Value;
use crate::document;

/// The two forms, the one that llama.cpp reads first.
const FORMS: [GgmlType; 2] = [GgmlType::Q2_0, GgmlType::Q2_0G128];

/// A tensor of the type in its place.
struct Place {
    /// Its index among the tensors.
    index: usize,
    /// Where the next tensor begins, or the data end.
    next: u64,
    /// Bytes and end with padding of each form; `None` where it has no such form.
    forms: [Option<(u64, u64)>; 2],
    /// For each form, whether it ends at `next`.
    fits: [bool; 2],
}

/// Gives each tensor of type 42 the type and length of its form. Offsets still count from the start
/// of the data section, of `data_len` bytes.
///
/// # Errors
/// [`Error::Q2Groups`] where both forms fit, or neither.
pub(super) fn settle(
    tensors: &mut [GgufTensor],
    metadata: &[(String, Value)],
    alignment: u32,
    data_len: u64,
) -> Result<()> {
    let places = places(tensors, alignment, data_len);
    let Some(first) = places.first() else {
        return Ok(());
    };
    let error = |fit| Err(unsettled(tensors, &places, first, fit));
    let form = match [0, 1].map(|form| places.iter().all(|place| place.fits[form])) {
        [true, false] => 0,
        [false, true] => 1,
        [false, false] => return error("neither"),
        [true, true] => match declared(metadata) {
            Some(form) => form,
            None => return error("both"),
        },
    };
    for place in places {
        if let Some((len, _)) = place.forms[form] {
            tensors[place.index].ggml_type = FORMS[form];
            tensors[place.index].len = len;
        }
    }
    Ok(())
}

/// The tensors of the type that have values. One that the end of the file cuts off in either form is
/// left out: its error names the file's length.
fn places(tensors: &[GgufTensor], alignment: u32, data_len: u64) -> Vec<Place> {
    let mut starts: Vec<u64> = tensors.iter().map(|t| t.offset).collect();
    starts.sort_unstable();
    let place = |(index, tensor): (usize, &GgufTensor)| {
        let after = starts.partition_point(|&start| start <= tensor.offset);
        let next = starts.get(after).copied();
        let forms = FORMS.map(|form| {
            let len = form.tensor_bytes(&tensor.shape).ok()?;
            let end = tensor.offset.checked_add(len)?;
            Some((len, end.checked_next_multiple_of(alignment.into())?))
        });
        let fits = forms.map(|form| match (form, next) {
            (Some((_, end)), Some(next)) => end == next,
            // The last tensor may end without padding.
            (Some((len, end)), None) => end == data_len || tensor.offset + len == data_len,
            (None, _) => false,
        });
        let cut_off =
            |form: &Option<(u64, u64)>| form.is_none_or(|(len, _)| tensor.offset + len > data_len);
        let is_cut_off = next.is_none() && forms.iter().all(cut_off);
        let next = next.unwrap_or(data_len);
        let place = Place {
            index,
            next,
            forms,
            fits,
        };
        (!is_cut_off).then_some(place)
    };
    let of_type = |t: &GgufTensor| t.ggml_type == GgmlType::Q2_0 && t.len > 0;
    let tensors = tensors.iter().enumerate().filter(|(_, t)| of_type(t));
    tensors.filter_map(place).collect()
}

fn unsettled(tensors: &[GgufTensor], places: &[Place], first: &Place, fit: &'static str) -> Error {
    let unfit = places.iter().find(|place| place.fits == [false; 2]);
    let place = unfit.unwrap_or(first);
    let bytes = |form: usize| places.iter().filter_map(move |p| p.forms[form]);
    let tensor = &tensors[place.index];
    Error::Q2Groups {
        fit,
        count: places.len(),
        sums: [0, 1].map(|form| bytes(form).fold(0u64, |sum, (len, _)| sum.saturating_add(len))),
        tensor: tensor.name.clone(),
        start: tensor.offset,
        next: place.next,
        ends: place.forms.map(|form| form.map_or(0, |(_, end)| end)),
    }
}

/// What the document of a file of this program says.
fn declared(metadata: &[(String, Value)]) -> Option<usize> {
    let (_, text) = metadata.iter().find(|(key, _)| key == document::KEY)?;
    let document: serde_json::Value = serde_json::from_str(text.as_str()?).ok()?;
    let tensors = document.get("tensors")?.as_object()?;
    let named = |layout: &str| {
        let mut layouts = tensors.values().filter_map(|t| t.get("layout")?.as_str());
        layouts.any(|name| name == layout)
    };
    match ["q2_0", "q2_0-g128"].map(named) {
        [true, false] => Some(0),
        [false, true] => Some(1),
        _ => None,
    }
}
