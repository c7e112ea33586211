//! How the KV of one model looks.

use kvkeep_core::{Rule, SizeRule, Topology};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

use crate::error::raise_core;

/// One group of layers.
#[pyclass(frozen, module = "kvkeep")]
#[derive(Clone)]
pub(crate) struct Group(kvkeep_core::Group);

fn rule(said: &Bound<'_, PyAny>) -> PyResult<Rule> {
    match (said.extract::<&str>(), said.extract::<(String, u32)>()) {
        (Ok("all"), _) => Ok(Rule::All),
        (Ok("state"), _) => Ok(Rule::State),
        (_, Ok((name, tokens))) if name == "window" => Ok(Rule::Window { tokens }),
        _ => Err(PyTypeError::new_err(r#"a rule is "all", "state" or ("window", tokens)"#)),
    }
}

fn size(said: &Bound<'_, PyAny>) -> PyResult<SizeRule> {
    if let Ok(bytes) = said.extract::<u64>() {
        return Ok(SizeRule::Exact(bytes));
    }
    match (said.extract::<(String, u64)>(), said.extract::<(String, u64, u64)>()) {
        (Ok((name, max)), _) if name == "up_to" => Ok(SizeRule::UpTo(max)),
        (_, Ok((name, step, max))) if name == "multiple_of" => Ok(SizeRule::MultipleOf { step, max }),
        _ => Err(PyTypeError::new_err(r#"a size is bytes, ("up_to", max) or ("multiple_of", step, max)"#)),
    }
}

#[pymethods]
impl Group {
    #[new]
    #[pyo3(signature = (tokens_per_block, size, *, rule = None, shards = 1, replicated = false))]
    fn new(
        tokens_per_block: u32,
        size: &Bound<'_, PyAny>,
        rule: Option<&Bound<'_, PyAny>>,
        shards: u16,
        replicated: bool,
    ) -> PyResult<Self> {
        let rule = rule.map_or(Ok(Rule::All), self::rule)?;
        Ok(Self(kvkeep_core::Group { rule, tokens_per_block, shards, replicated, size: self::size(size)? }))
    }

    fn __repr__(&self) -> String {
        format!("{:?}", self.0)
    }
}

/// The declaration of one model's KV.
#[pyclass(frozen, module = "kvkeep")]
pub(crate) struct Format(pub(crate) kvkeep_core::Format);

#[pymethods]
impl Format {
    #[new]
    #[pyo3(signature = (
        model, groups, *, dtype, layout, hash_algorithm, tokens_per_key, hash_seed = String::new(), tp = 1, pp = 1, cp = 1,
        canonical = false, prefill_us_per_token = 0, prefill_doubles_at_tokens = 0,
    ))]
    #[expect(clippy::too_many_arguments, reason = "keywords of Python")]
    fn new(
        model: String,
        groups: Vec<PyRef<'_, Group>>,
        dtype: String,
        layout: String,
        hash_algorithm: String,
        tokens_per_key: u32,
        hash_seed: String,
        tp: u16,
        pp: u16,
        cp: u16,
        canonical: bool,
        prefill_us_per_token: u32,
        prefill_doubles_at_tokens: u32,
    ) -> PyResult<Self> {
        let format = kvkeep_core::Format {
            model,
            dtype,
            layout,
            hash_algorithm,
            hash_seed,
            tokens_per_key,
            topology: Topology { canonical, tp, pp, cp },
            groups: groups.iter().map(|group| group.0.clone()).collect(),
            prefill_us_per_token,
            prefill_doubles_at_tokens,
        };
        format.validate().map_err(raise_core)?;
        Ok(Self(format))
    }

    #[getter]
    fn fingerprint(&self) -> String {
        self.0.fingerprint().to_string()
    }

    fn differences(&self, other: &Self) -> Vec<String> {
        self.0.differences(&other.0)
    }

    fn __eq__(&self, other: &Self) -> bool {
        self.0 == other.0
    }

    fn __hash__(&self) -> u64 {
        let bytes = self.0.fingerprint().0;
        u64::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5], bytes[6], bytes[7]])
    }

    fn __repr__(&self) -> String {
        format!("{:?}", self.0)
    }
}
