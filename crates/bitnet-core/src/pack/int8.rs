//! `i8`: one signed byte a value, row-major, of any precision. Ours; the layout that every other
//! one is compared with.

use super::{
    Bad, Layout, PackedLen, Unpacked, check_len, check_precision, check_values, first_outside,
};
use crate::{MatrixSpec, Precision, Result};

/// One byte a value.
#[derive(Debug)]
pub(super) struct Int8;

impl Layout for Int8 {
    fn name(&self) -> &'static str {
        "i8"
    }

    fn summary(&self) -> &'static str {
        "one signed byte a value, any precision, 8 bits per weight (ours)"
    }

    fn default_for(&self) -> &'static [Precision] {
        &[Precision::Int8]
    }

    fn check(&self, spec: &MatrixSpec) -> Result<()> {
        check_precision(self.name(), spec, Precision::ALL)
    }

    fn packed_len(&self, spec: &MatrixSpec) -> PackedLen {
        PackedLen::Exact(spec.values_len())
    }

    fn chunk_rows(&self, _: &MatrixSpec) -> Option<usize> {
        Some(1)
    }

    fn pack_into(
        &self,
        spec: &MatrixSpec,
        values: &[i8],
        _: &[f32],
        out: &mut Vec<u8>,
    ) -> Result<()> {
        self.check(spec)?;
        check_values(spec, values)?;
        out.extend(values.iter().map(|&v| v.cast_unsigned()));
        Ok(())
    }

    fn unpack(&self, spec: &MatrixSpec, bytes: &[u8]) -> Result<Unpacked> {
        self.check(spec)?;
        check_len("packed bytes", spec.values_len(), bytes.len())?;
        let values: Vec<i8> = bytes.iter().map(|&b| b.cast_signed()).collect();
        match first_outside(spec.precision, &values) {
            None => Ok(Unpacked {
                values,
                scales: None,
            }),
            Some(i) => Err(Bad::new(
                i,
                format!("{}, outside {}", values[i], spec.precision.alphabet()),
            )
            .at(self.name(), 0)),
        }
    }
}
