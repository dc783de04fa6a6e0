//! Quantization-aware training by a configuration.

use super::checkpoint::checkpoints;
use super::config::QATConfig;
use super::events::{Callback, Outcome};
use super::linear::{Linear, Linears};
use super::task::Task;
use super::training::{Training, gradients, scalar};
use crate::{CheckpointError, Error, Result};
use candle_core::Tensor;
use candle_core::backprop::GradStore;
use candle_nn::VarMap;

/// Trains a [`Task`] by a [`QATConfig`].
///
/// ```
/// # use bitnet_quant::{Result, qat::{Linear, Linears, QATConfig, QATTrainer, StraightThroughEstimator, Task}};
/// # use candle_core::{DType, Device, Module, Tensor};
/// # use candle_nn::{Init, VarBuilder, VarMap};
/// struct Line { vars: VarMap, layer: Linear }
///
/// impl Linears for Line {
///     fn visit_linears(&mut self, visit: &mut dyn FnMut(&str, &mut Linear) -> Result<()>) -> Result<()> {
///         visit("layer", &mut self.layer)
///     }
/// }
///
/// impl Task for Line {
///     fn vars(&self) -> &VarMap {
///         &self.vars
///     }
///     fn loss(&mut self, step: u64, _: u64) -> Result<Tensor> {
///         let x = Tensor::new(&[[1f32, (step % 7) as f32]], &Device::Cpu)?;
///         Ok((self.layer.forward(&x)? - x.sum_all()?.to_scalar::<f32>()? as f64)?.sqr()?.sum_all()?)
///     }
///     fn evaluate(&mut self) -> Result<f64> {
///         Ok(self.loss(3, 0)?.to_scalar::<f32>()?.into())
///     }
///     fn linears(&mut self) -> Option<&mut dyn Linears> {
///         Some(self)
///     }
/// }
///
/// let vars = VarMap::new();
/// vars.get((1, 2), "layer.weight", Init::Const(0.1), DType::F32, &Device::Cpu)?;
/// let layer = Linear::new(2, 1, false, &VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu).pp("layer"))?;
/// let mut task = Line { vars: vars.clone(), layer };
/// let mut trainer = QATTrainer::new(QATConfig::builder().steps(200).learning_rate(0.02).build()?)?;
/// trainer.prepare(&mut task, &vars)?;
/// let outcome = trainer.run(&mut task, &mut ())?;
/// assert_eq!(outcome.step, 200);
/// assert!(outcome.evaluation.is_some_and(|e| e.value < 1.0), "{outcome:?}");
/// # Ok::<(), bitnet_quant::Error>(())
/// ```
#[derive(Debug)]
pub struct QATTrainer {
    config: QATConfig,
    /// Latent weights, whose gradients are scaled.
    latent: Vec<Tensor>,
}

impl QATTrainer {
    /// A trainer; it can train several tasks, one after another.
    ///
    /// # Errors
    /// As [`QATConfig::validate`].
    pub fn new(config: QATConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            config,
            latent: vec![],
        })
    }

    /// The configuration.
    pub fn config(&self) -> &QATConfig {
        &self.config
    }

    /// [`prepare`](super::prepare) with the configuration of the trainer, dead-zone bias included.
    /// Returns the names of the layers in training.
    ///
    /// # Errors
    /// As [`prepare`](super::prepare); [`Error::Input`] for a dead-zone bias if no layer has
    /// ternary weights of one plane.
    pub fn prepare(&mut self, model: &mut dyn Linears, vars: &VarMap) -> Result<Vec<String>> {
        let names = super::prepare(
            model,
            &self.config.quantization,
            self.config.estimator,
            vars,
        )?;
        let (beta, mut without) = (self.config.dead_zone_bias, true);
        if beta != 0.0 {
            model.visit_linears(&mut |_, linear| match linear {
                Linear::Qat(layer) if layer.has_dead_zone() => {
                    without = false;
                    layer.set_dead_zone_bias(beta)
                }
                _ => Ok(()),
            })?;
            if without {
                return Err(Error::input(
                    "dead-zone bias",
                    "layers of ternary weights of one plane",
                    "none",
                ));
            }
        }
        self.collect_latent(model)?;
        Ok(names)
    }

    fn collect_latent(&mut self, model: &mut dyn Linears) -> Result<()> {
        self.latent.clear();
        model.visit_linears(&mut |_, linear| {
            if let Linear::Qat(layer) = linear {
                self.latent.push(layer.weight().clone());
            }
            Ok(())
        })
    }

    /// The gradients of a scalar loss, those of latent weights times `gradient_scaling`. For a
    /// custom training loop; [`QATTrainer::run`] does this itself.
    ///
    /// # Errors
    /// [`Error::Input`] for a loss that is not a scalar or not finite.
    pub fn backward_with_ste(&self, loss: &Tensor) -> Result<GradStore> {
        let value = scalar(loss)?;
        if !value.is_finite() {
            return Err(Error::input("loss", "a number", value));
        }
        gradients(&self.config, &self.latent, loss)
    }

    /// Sets stage and strength of every layer for `step`, counted from 0. A custom loop may count
    /// in another unit, epochs for instance, if `steps` of the configuration does so too. Returns
    /// the names of the layers that changed their stage.
    ///
    /// # Errors
    /// As [`Progressive::apply`](super::Progressive::apply).
    pub fn update_quantization_schedule(
        &self,
        step: u64,
        model: &mut dyn Linears,
    ) -> Result<Vec<String>> {
        self.config
            .progressive
            .as_ref()
            .map_or(Ok(vec![]), |progressive| progressive.apply(model, step))
    }

    /// Trains from the first step. The folder of checkpoints, if one is configured, must not hold
    /// any.
    ///
    /// # Errors
    /// [`Error::Diverged`] if loss or gradients are not finite;
    /// [`CheckpointError::Exists`](crate::CheckpointError::Exists) for a folder with checkpoints;
    /// any error of the task.
    pub fn run(&mut self, task: &mut dyn Task, callback: &mut dyn Callback) -> Result<Outcome> {
        if let Some(config) = &self.config.checkpoint
            && let Some((_, path)) = checkpoints(&config.folder)?.pop()
        {
            return Err(CheckpointError::Exists { path }.into());
        }
        self.find_latent(task)?;
        Training::begin(&self.config, &self.latent, task)?.run(task, callback)
    }

    /// Continues from the newest checkpoint; the result has the same bits as if the training had
    /// never stopped.
    ///
    /// # Errors
    /// As [`QATTrainer::run`]; [`CheckpointError::Mismatch`](crate::CheckpointError::Mismatch) for
    /// a checkpoint of another model or configuration,
    /// [`CheckpointError::File`](crate::CheckpointError::File) for a folder without checkpoints and
    /// for one that is damaged.
    pub fn resume(&mut self, task: &mut dyn Task, callback: &mut dyn Callback) -> Result<Outcome> {
        let Some(config) = self.config.checkpoint.clone() else {
            return Err(Error::input(
                "checkpoint",
                "a folder to resume from",
                "none",
            ));
        };
        let Some((_, path)) = checkpoints(&config.folder)?.pop() else {
            let expected = "a checkpoint to resume from";
            return Err(bitnet_formats::Error::file(&config.folder, expected, "none").into());
        };
        self.find_latent(task)?;
        let mut training = Training::begin(&self.config, &self.latent, task)?;
        training.restore(&config.folder, path, task)?;
        training.run(task, callback)
    }

    fn find_latent(&mut self, task: &mut dyn Task) -> Result<()> {
        match task.linears() {
            Some(model) => self.collect_latent(model),
            None => Ok(()),
        }
    }
}
