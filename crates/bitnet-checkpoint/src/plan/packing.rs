//! Which layout and which scales a tensor gets.

use super::{Action, Builder, Pack, mlx};
use crate::forms::MatrixForm;
use crate::recipe::{Choices, Format, Target};
use crate::{Error, Result};
use bitnet_core::pack::{self, Layout, LayoutOrigin};
use bitnet_core::{Granularity, Matrix, MatrixSpec, Precision, ScaleDtype, ScaleForm};
use bitnet_formats::hf::LinearClass;
use bitnet_formats::{Content, ScaleSource, StoredId, StoredType, Tensor, TensorId, output};

impl Pack {
    /// The matrix as its tensor stores it.
    pub(crate) fn form(&self) -> MatrixForm {
        MatrixForm {
            rows: self.spec.rows,
            cols: self.spec.cols,
            transposed: self.transposed,
        }
    }
}

impl Builder<'_> {
    /// Plans the quantization of a matrix: the first layout and scales that can hold it.
    pub(crate) fn quantize(&mut self, index: TensorId, choices: &Choices) -> Result<()> {
        let tensor = self.source.tensor(index);
        let Target::Quantized(precision) = choices.target() else {
            return self.keep(index);
        };
        let Some(form) = self.form(tensor)? else {
            return self.keep(index);
        };
        let named = match choices.layout.as_deref() {
            None => None,
            Some(output::AUTO) if self.format != Format::Safetensors => {
                return Err(Error::Recipe(
                    "layout auto picks among our own layouts, which only safetensors holds".into(),
                ));
            }
            Some(output::AUTO) if self.given.contains_key(&tensor.name) => None,
            Some(output::AUTO) => return self.quantize_auto(index, choices),
            Some(name) => Some(pack::by_name(name)?),
        };
        let mut allowed = self.allowed_layouts(named, precision)?;
        if self.format == Format::Gguf && self.shape(tensor).len() > 2 {
            // Fewer readers know the later choices (Q2_0), above all for stacked experts.
            allowed.truncate(1);
        }
        if self.format == Format::HfBitnet {
            self.check_hf_bitnet(tensor, form, choices, allowed[0])?;
            if self.stays_f32_in_transformers(tensor) {
                let refusal = bitnet_core::Error::Unsupported {
                    layout: allowed[0].name(),
                    why: "transformers keeps the modules 'wo' of this model in f32".into(),
                };
                return self.keep_unquantized(index, &refusal);
            }
        }
        if let Some(refusal) = self.not_in_mlx(tensor, form.transposed) {
            return self.keep_unquantized(index, &refusal);
        }
        if let Some(matrix) = self.given.remove(&tensor.name) {
            return self.quantize_given(index, matrix, choices.layout.as_deref());
        }
        if self.format == Format::Gguf && form.transposed {
            return Err(self.tensor_error(tensor)(transposed_in_gguf(allowed[0])));
        }
        match self.first_fit(tensor, form, choices, &allowed)? {
            Fit::Pack(pack) => self.pack(index, *pack, None),
            Fit::None {
                refusal,
                shape_is_to_blame,
            } if named.is_none() && shape_is_to_blame && self.format != Format::Safetensors => {
                self.keep_unquantized(index, &refusal)
            }
            Fit::None { refusal, .. } => Err(self.tensor_error(tensor)(refusal)),
        }
    }

    /// The form of the output of a tensor.
    fn form(&self, tensor: &Tensor) -> Result<Option<MatrixForm>> {
        let (form, output) = (self.forms.form(tensor), self.reshaped.as_ref());
        let (Some(form), Some(output)) = (form, output) else {
            return Ok(form);
        };
        if form.transposed {
            let refusal = bitnet_core::Error::Unsupported {
                layout: "gguf",
                why: "it is stored [in, out], and experts are split and joined as [out, in]".into(),
            };
            return Err(self.tensor_error(tensor)(refusal));
        }
        Ok((output.shape.len() > 1).then(|| MatrixForm {
            rows: output.matrix_rows(),
            ..form
        }))
    }

    /// Says which quantized matrices have the inputs first, how that is known, and what contradicts
    /// it.
    pub(super) fn note_transposed(&mut self) {
        let packed = self.tensor_jobs.iter().filter_map(|job| match &job.action {
            Action::Pack(pack) if pack.transposed => job.tensor,
            _ => None,
        });
        let names: Vec<&str> = packed
            .map(|id| self.source.tensor(id).name.as_str())
            .collect();
        if let Some(first) = names.first() {
            let evidence = self.forms.evidence(names.iter().copied());
            self.notes.push(format!(
                "{} weights are stored [in, out], e.g. {first} ({evidence}): they are quantized as \
                 [out, in], so that a scale is one of an output",
                names.len()
            ));
        }
        self.notes.extend(self.forms.notes.iter().cloned());
    }

    /// The layouts to try: the one that was named, if the container holds it, or the defaults.
    fn allowed_layouts(
        &self,
        named: Option<&'static dyn Layout>,
        precision: Precision,
    ) -> Result<Vec<&'static dyn Layout>> {
        let Some(layout) = named else {
            return default_layouts(self.format, precision);
        };
        if self.holds(layout) {
            Ok(vec![layout])
        } else {
            Err(self.does_not_hold(layout))
        }
    }

    /// Whether the output format holds a layout.
    fn holds(&self, layout: &dyn Layout) -> bool {
        match self.format {
            Format::HfBitnet => layout.origin() == LayoutOrigin::HfBitnet,
            Format::Mlx => Precision::ALL
                .iter()
                .filter_map(|&precision| mlx::layout(precision))
                .any(|own| own.name() == layout.name()),
            Format::Safetensors | Format::Gguf => output::stores(&self.container, layout),
            Format::Onnx => false,
        }
    }

    fn does_not_hold(&self, layout: &dyn Layout) -> Error {
        Error::Recipe(format!(
            "format {} does not hold layout {}",
            self.format,
            layout.name()
        ))
    }

    /// Refuses what an HF bitnet folder cannot say about a layer: that it is no linear layer, another
    /// scale type, and a bias that the linear class would scale.
    fn check_hf_bitnet(
        &self,
        tensor: &Tensor,
        form: MatrixForm,
        choices: &Choices,
        layout: &dyn Layout,
    ) -> Result<()> {
        let refused = |why: String| {
            Err(self.tensor_error(tensor)(bitnet_core::Error::Unsupported {
                layout: layout.name(),
                why,
            }))
        };
        if tensor.shape.len() != 2 {
            return refused(format!(
                "transformers' bitnet replaces linear layers only, and this has {} dimensions; give \
                 --format safetensors, or a rule that keeps it",
                tensor.shape.len()
            ));
        }
        if is_numbered_expert(&tensor.name) {
            return refused(
                "transformers joins the experts to one tensor, which its bitnet does not replace; \
                 give --format safetensors, or --exclude '*.experts.*'"
                    .into(),
            );
        }
        if form.transposed {
            return Err(self.tensor_error(tensor)(transposed_in_transformers(
                layout,
            )));
        }
        let model = self.model_dtype();
        if let Some(dtype) = choices.scale_dtype.filter(|&dtype| dtype != model) {
            return Err(Error::Recipe(format!(
                "format hf-bitnet stores scales in the model's type {model}, not {dtype}"
            )));
        }
        let bias = tensor
            .name
            .strip_suffix("weight")
            .and_then(|layer| self.source.find(&format!("{layer}bias")));
        if let (Some(bias), LinearClass::AutoBitLinear) = (bias, self.linear_class) {
            return refused(format!(
                "linear_class autobitlinear multiplies the bias '{}' by the scale too; \
                 bitlinear does not",
                bias.name
            ));
        }
        Ok(())
    }

    /// Whether the model's class names this module in `_keep_in_fp32_modules`, which transformers'
    /// quantizers leave alone: the output of the feed-forward layers of T5.
    fn stays_f32_in_transformers(&self, tensor: &Tensor) -> bool {
        let model_type = self.config.as_ref().and_then(|c| c["model_type"].as_str());
        tensor.name.ends_with(".wo.weight") && model_type.is_some_and(|m| m.contains("t5"))
    }

    /// Packs values that the caller gave instead of quantizing the weights.
    fn quantize_given(
        &mut self,
        index: TensorId,
        matrix: Matrix,
        layout: Option<&str>,
    ) -> Result<()> {
        let tensor = self.source.tensor(index);
        let (rows, cols) = tensor.matrix_shape().unwrap_or((1, tensor.elements()));
        if (matrix.spec.rows, matrix.spec.cols) != (rows, cols) {
            return Err(self.tensor_error(tensor)(bitnet_core::Error::Length {
                what: "given values",
                expected: rows * cols,
                got: matrix.spec.weights_len(),
            }));
        }
        let known = KnownValues {
            spec: matrix.spec.clone(),
            transposed: false,
            layout: None,
            inverses: None,
            given: Some(Box::new(matrix)),
        };
        self.repack(index, known, layout)
    }

    /// The first of the allowed layouts, with the first of its scale choices, that holds the
    /// matrix.
    fn first_fit(
        &self,
        tensor: &Tensor,
        matrix: MatrixForm,
        choices: &Choices,
        allowed: &[&'static dyn Layout],
    ) -> Result<Fit> {
        let (rows, cols) = (matrix.rows, matrix.cols);
        let form = self.scale_form();
        let mut first_refusal = None;
        let mut possible = false;
        for &layout in allowed {
            for (granularity, dtype) in self.scale_choices(layout, choices) {
                let Some(scheme) = choices.scheme(granularity, dtype, form)? else {
                    continue;
                };
                let spec = scheme.spec(rows, cols).map_err(self.tensor_error(tensor))?;
                match self.check_matrix(layout, &spec) {
                    Ok(()) if self.format == Format::HfBitnet && rows % 4 != 0 => {
                        let why =
                            format!("transformers needs a multiple of 4 rows, and it has {rows}");
                        let layout = layout.name();
                        first_refusal
                            .get_or_insert(bitnet_core::Error::Unsupported { layout, why });
                    }
                    Ok(()) => {
                        return Ok(Fit::Pack(Box::new(Pack {
                            scheme: Some(scheme),
                            spec,
                            transposed: matrix.transposed,
                            layout: Some(layout),
                            scale_dtype: dtype,
                            scale_form: form,
                            importance: None,
                            given: None,
                        })));
                    }
                    Err(why) => {
                        possible |= self.fits_with_other_scales(layout, (rows, cols), choices);
                        first_refusal.get_or_insert(why);
                    }
                }
            }
        }
        Ok(Fit::None {
            refusal: first_refusal.unwrap_or_else(no_layout),
            shape_is_to_blame: !possible,
        })
    }

    /// Whether a layout would hold the matrix if the user had not chosen granularity and scale
    /// type.
    fn fits_with_other_scales(
        &self,
        layout: &dyn Layout,
        (rows, cols): (usize, usize),
        choices: &Choices,
    ) -> bool {
        let free = Choices {
            granularity: None,
            scale_dtype: None,
            ..choices.clone()
        };
        let form = self.scale_form();
        self.scale_choices(layout, &free)
            .iter()
            .filter_map(|&(granularity, dtype)| {
                choices.scheme(granularity, dtype, form).ok().flatten()
            })
            .filter_map(|scheme| scheme.spec(rows, cols).ok())
            .any(|spec| self.check_matrix(layout, &spec).is_ok())
    }

    /// Whether the layout, as the format uses it, can hold the matrix.
    fn check_matrix(&self, layout: &dyn Layout, spec: &MatrixSpec) -> bitnet_core::Result<()> {
        if self.format == Format::Mlx {
            mlx::check(spec)?;
        }
        layout.check(spec)
    }

    /// Why mlx cannot read a matrix of this tensor, if it cannot.
    fn not_in_mlx(&self, tensor: &Tensor, transposed: bool) -> Option<bitnet_core::Error> {
        let why = if self.format != Format::Mlx {
            return None;
        } else if is_numbered_expert(&tensor.name) {
            "mlx-lm stacks the weights of experts, and not their scales".into()
        } else if transposed {
            "its matrices are [out, in], and this is stored [in, out]".into()
        } else if tensor.shape.len() == 2 && is_module(&tensor.name) {
            return None;
        } else {
            let dims = tensor.shape.len();
            format!("it holds matrices '….weight', and this has {dims} dimensions")
        };
        let layout = "mlx";
        Some(bitnet_core::Error::Unsupported { layout, why })
    }

    /// Keeps a tensor that no layout of the container can hold, with a note.
    fn keep_unquantized(&mut self, index: TensorId, refusal: &bitnet_core::Error) -> Result<()> {
        let note = format!("not quantized: {refusal}");
        if self.format == Format::Gguf {
            return self.cast(index, ScaleDtype::F16, Some(format!("{note}; kept as F16")));
        }
        self.keep(index)?;
        if let Some(job) = self.tensor_jobs.last_mut() {
            job.note = Some(note);
        }
        Ok(())
    }

    /// Whether the output stores scales or their inverses.
    fn scale_form(&self) -> ScaleForm {
        if self.format == Format::HfBitnet && self.linear_class.is_reciprocal() {
            ScaleForm::Inverse
        } else {
            ScaleForm::Direct
        }
    }

    pub(super) fn quantize_auto(&mut self, index: TensorId, choices: &Choices) -> Result<()> {
        let tensor = self.source.tensor(index);
        let Some(form) = self.form(tensor)? else {
            return self.keep(index);
        };
        let (rows, cols) = (form.rows, form.cols);
        let granularity = choices.granularity.unwrap_or(Granularity::Channel);
        let dtype = choices.scale_dtype.unwrap_or(ScaleDtype::F32);
        let Some(scheme) = choices.scheme(granularity, dtype, ScaleForm::Direct)? else {
            return self.keep(index);
        };
        let spec = scheme.spec(rows, cols).map_err(self.tensor_error(tensor))?;
        self.pack(
            index,
            Pack {
                scheme: Some(scheme),
                spec,
                transposed: form.transposed,
                layout: None,
                scale_dtype: dtype,
                scale_form: ScaleForm::Direct,
                importance: None,
                given: None,
            },
            None,
        )
    }

    /// Granularities and scale types to try for a layout: what was chosen, else the finest that
    /// costs nothing.
    pub(super) fn scale_choices(
        &self,
        layout: &dyn Layout,
        choices: &Choices,
    ) -> Vec<(Granularity, ScaleDtype)> {
        let granularities: Vec<Granularity> = match choices.granularity {
            Some(granularity) => vec![granularity],
            None if self.format == Format::Mlx => mlx::GROUPS.map(Granularity::Group).to_vec(),
            None => layout.default_granularities().to_vec(),
        };
        let dtypes = match choices.scale_dtype {
            Some(dtype) => vec![dtype],
            None if layout.stores_scales() => vec![ScaleDtype::F16, ScaleDtype::F32],
            None if self.format == Format::HfBitnet || self.format == Format::Mlx => {
                vec![self.model_dtype()]
            }
            None => vec![ScaleDtype::F32],
        };
        granularities
            .iter()
            .flat_map(|&g| dtypes.iter().map(move |&d| (g, d)))
            .collect()
    }

    /// The type of the model's weights, as its config says.
    pub(super) fn model_dtype(&self) -> ScaleDtype {
        let dtype = |key: &str| {
            self.config
                .as_ref()
                .and_then(|c| c.get(key))
                .and_then(|v| v.as_str())
        };
        match dtype("dtype").or(dtype("torch_dtype")) {
            Some("bfloat16") => ScaleDtype::Bf16,
            Some("float16") => ScaleDtype::F16,
            _ => ScaleDtype::F32,
        }
    }

    /// The type of a stored tensor of scales.
    pub(super) fn scale_dtype_of(&self, stored: StoredId) -> ScaleDtype {
        let dtype = self.source.stored(stored).dtype;
        ScaleDtype::ALL
            .iter()
            .copied()
            .find(|&d| StoredType::from(d) == dtype)
            .unwrap_or(ScaleDtype::F32)
    }

    /// Packs the values of a quantized source again: in the layout of that name, or in one that
    /// holds them.
    pub(super) fn recode(&mut self, index: TensorId, layout: Option<&str>) -> Result<()> {
        let Content::Quantized(q) = &self.source.tensor(index).content else {
            return self.keep(index);
        };
        let inverses = match q.scales {
            ScaleSource::Stored {
                id,
                reciprocal: true,
            } => Some(id),
            _ => None,
        };
        let mut spec = q.spec.clone();
        if let Some(output) = &self.reshaped {
            spec.rows = output.matrix_rows();
            if !self.joined().is_empty() && spec.granularity == Granularity::Tensor {
                // Each expert has a scale.
                spec.granularity = Granularity::Channel;
            }
        }
        let known = KnownValues {
            spec,
            transposed: q.transposed,
            layout: Some(q.layout),
            inverses,
            given: None,
        };
        self.repack(index, known, layout)
    }

    /// Packs known values in the layout of that name, or in one that holds them.
    fn repack(&mut self, index: TensorId, known: KnownValues, layout: Option<&str>) -> Result<()> {
        if layout == Some(output::AUTO) && self.format == Format::Safetensors {
            let pack = Pack {
                scheme: None,
                scale_dtype: known.spec.scale_dtype,
                spec: known.spec,
                transposed: known.transposed,
                layout: None,
                scale_form: ScaleForm::Direct,
                importance: None,
                given: known.given,
            };
            return self.pack(index, pack, None);
        }
        let layouts = match (layout, known.layout) {
            (Some(name), _) => vec![pack::by_name(name)?],
            (None, Some(own))
                if self.format != Format::HfBitnet
                    && self.format != Format::Mlx
                    && output::stores(&self.container, own)
                    && own.origin() != LayoutOrigin::HfBitnet =>
            {
                vec![own]
            }
            (None, _) => default_layouts(self.format, known.spec.precision)?,
        };
        let tensor = self.source.tensor(index);
        if known.transposed && matches!(self.format, Format::Gguf | Format::HfBitnet) {
            let refusal = match self.format {
                Format::Gguf => transposed_in_gguf(layouts[0]),
                _ => transposed_in_transformers(layouts[0]),
            };
            return Err(self.tensor_error(tensor)(refusal));
        }
        if let Some(refusal) = self.not_in_mlx(tensor, known.transposed) {
            let note = format!("not packed: {refusal}; kept exactly, as F32");
            return self.cast(index, ScaleDtype::F32, Some(note));
        }
        let groups = if self.format == Format::Mlx {
            [128, 64, 32, 256]
        } else {
            [32, 64, 128, 256]
        };
        for &layout in &layouts {
            if !output::stores(&self.container, layout) || !self.holds(layout) {
                return Err(self.does_not_hold(layout));
            }
        }
        // Groups within those of the source hold its scales in any case, larger ones only if the
        // scales agree, which is known when they are read: so larger ones are the last choice.
        let (within, larger): (Vec<_>, Vec<_>) = with_other_scales(&known.spec, groups)
            .into_iter()
            .partition(|spec| is_within(spec.granularity, known.spec.granularity));
        let mut refusal = None;
        for specs in [within, larger] {
            let pairs = layouts
                .iter()
                .flat_map(|&l| specs.iter().map(move |s| (l, s)));
            for (layout, spec) in pairs {
                if let Err(why) = self.check_matrix(layout, spec) {
                    refusal = refusal.or(Some(why));
                    continue;
                }
                let (stored, spec) = self.stored_scales(spec.clone(), known.inverses);
                let form = self.scale_form();
                let note = scale_note(known.spec.scale_dtype, &spec, stored, form);
                let pack = Pack {
                    scheme: None,
                    spec,
                    transposed: known.transposed,
                    layout: Some(layout),
                    scale_dtype: stored,
                    scale_form: form,
                    importance: None,
                    given: known.given,
                };
                return self.pack(index, pack, note);
            }
        }
        let refusal = refusal.unwrap_or_else(no_layout);
        let kept = match self.format {
            Format::Gguf => shape_is_to_blame(&known.spec),
            Format::Mlx => !known.spec.cols.is_multiple_of(32),
            Format::Safetensors | Format::HfBitnet | Format::Onnx => false,
        };
        if layout.is_none() && kept {
            let note = format!("not packed: {refusal}; kept exactly, as F32");
            return self.cast(index, ScaleDtype::F32, Some(note));
        }
        Err(self.tensor_error(self.source.tensor(index))(refusal))
    }

    /// The type in which the output stores scales, and the spec with the type that every scale has
    /// when it is read again.
    fn stored_scales(
        &self,
        spec: MatrixSpec,
        inverses: Option<StoredId>,
    ) -> (ScaleDtype, MatrixSpec) {
        let with_dtype = |dtype, spec| MatrixSpec {
            scale_dtype: dtype,
            ..spec
        };
        match (self.scale_form(), inverses) {
            (ScaleForm::Inverse, Some(index)) => (self.scale_dtype_of(index), spec),
            (ScaleForm::Inverse, None) => (ScaleDtype::F32, with_dtype(ScaleDtype::F32, spec)),
            // transformers gives weight_scale the type of the model.
            (ScaleForm::Direct, _) if self.format == Format::HfBitnet => {
                (self.model_dtype(), with_dtype(self.model_dtype(), spec))
            }
            (ScaleForm::Direct, _) => (spec.scale_dtype, spec),
        }
    }
}

/// The outcome of looking for a layout.
enum Fit {
    Pack(Box<Pack>),
    None {
        /// Why the first layout cannot hold the matrix.
        refusal: bitnet_core::Error,
        /// Whether no choice of scales would help.
        shape_is_to_blame: bool,
    },
}

fn no_layout() -> bitnet_core::Error {
    bitnet_core::Error::Scheme("no layout".into())
}

/// Whether each granule of `a` lies within one of `b`.
fn is_within(a: Granularity, b: Granularity) -> bool {
    match (a, b) {
        (_, Granularity::Tensor) | (Granularity::Group(_), Granularity::Channel) => true,
        (Granularity::Group(a), Granularity::Group(b)) => b.is_multiple_of(a),
        (a, b) => a == b,
    }
}

/// The spec with the granularities and scale types that hold the same scales, its own first.
fn with_other_scales(spec: &MatrixSpec, groups: [usize; 4]) -> Vec<MatrixSpec> {
    let granularities = [spec.granularity]
        .into_iter()
        .chain(groups.map(Granularity::Group))
        .chain([Granularity::Tensor]);
    let dtypes = [spec.scale_dtype, ScaleDtype::F16, ScaleDtype::F32];
    granularities
        .flat_map(|granularity| {
            dtypes.map(|scale_dtype| MatrixSpec {
                granularity,
                scale_dtype,
                ..spec.clone()
            })
        })
        .collect()
}

/// What the user must know about scales that were of type `from`.
fn scale_note(
    from: ScaleDtype,
    spec: &MatrixSpec,
    stored: ScaleDtype,
    form: ScaleForm,
) -> Option<String> {
    let same = spec.scale_dtype == from;
    match form {
        ScaleForm::Inverse if same && stored != ScaleDtype::F32 => None,
        ScaleForm::Inverse => Some(
            "codes exact, scales to the last bit of f32: their inverses are stored".to_string(),
        ),
        ScaleForm::Direct if same || spec.scale_dtype == ScaleDtype::F32 => None,
        ScaleForm::Direct => Some(format!(
            "codes exact, scales rounded from {from} to {stored}"
        )),
    }
}

fn transposed_in_transformers(layout: &dyn Layout) -> bitnet_core::Error {
    bitnet_core::Error::Unsupported {
        layout: layout.name(),
        why: "it is stored [in, out] (Conv1D, as in gpt2), which transformers' bitnet does not \
              replace; give --format safetensors"
            .into(),
    }
}

fn transposed_in_gguf(layout: &dyn Layout) -> bitnet_core::Error {
    bitnet_core::Error::Unsupported {
        layout: layout.name(),
        why: "it is stored [in, out], and GGUF stores [out, in]; give --format safetensors, or a \
              rule that keeps it"
            .into(),
    }
}

/// Values and scales that need no quantizer.
struct KnownValues {
    spec: MatrixSpec,
    /// Whether the tensor has the inputs first.
    transposed: bool,
    /// The layout that they have.
    layout: Option<&'static dyn Layout>,
    /// The stored tensor of their inverse scales.
    inverses: Option<StoredId>,
    /// The values themselves, where the source does not hold them.
    given: Option<Box<Matrix>>,
}

/// Whether no block type of GGUF would take the matrix even with the plainest scales.
fn shape_is_to_blame(spec: &MatrixSpec) -> bool {
    let plain = MatrixSpec {
        planes: 1,
        granularity: Granularity::Tensor,
        scale_dtype: ScaleDtype::F16,
        ..spec.clone()
    };
    default_layouts(Format::Gguf, spec.precision)
        .is_ok_and(|layouts| layouts.iter().all(|l| l.check(&plain).is_err()))
}

/// Layouts to try for a precision when none is named.
pub(super) fn default_layouts(
    format: Format,
    precision: Precision,
) -> Result<Vec<&'static dyn Layout>> {
    let found: Vec<&'static dyn Layout> = pack::layouts()
        .iter()
        .copied()
        .filter(|layout| layout.default_for().contains(&precision))
        .filter(|layout| match format {
            Format::Safetensors => layout.origin() == LayoutOrigin::Own,
            Format::HfBitnet => layout.origin() == LayoutOrigin::HfBitnet,
            Format::Mlx => mlx::layout(precision).is_some_and(|own| own.name() == layout.name()),
            Format::Gguf => matches!(layout.origin(), LayoutOrigin::Ggml(_)),
            Format::Onnx => false,
        })
        .collect();
    if !found.is_empty() {
        return Ok(found);
    }
    Err(Error::Recipe(match format {
        Format::HfBitnet => format!("format hf-bitnet holds ternary weights, not {precision}"),
        Format::Safetensors | Format::Gguf | Format::Mlx | Format::Onnx => {
            format!("format {format} has no type for {precision}")
        }
    }))
}

/// Whether a tensor is the weight of a module, beside which MLX finds scales.
fn is_module(name: &str) -> bool {
    name.ends_with(".weight")
}

/// Whether a tensor belongs to one expert of several: `….experts.3.up_proj.weight`.
fn is_numbered_expert(name: &str) -> bool {
    name.split_once(".experts.")
        .is_some_and(|(_, rest)| rest.starts_with(|c: char| c.is_ascii_digit()))
}
