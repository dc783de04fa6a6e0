//! Values that are names: what the library says of an unknown one, and the name that was meant.

use bitnet_checkpoint::recipe::{Rule, Target};
use bitnet_core::pack;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, Command, Error};
use std::ffi::OsStr;
use std::fmt::Display;
use std::str::FromStr;

/// Parses a name by a function of the library. An unknown name is an error with the library's
/// words, which list the known ones, and with the most similar of them.
#[derive(Clone)]
pub(crate) struct NameParser<T> {
    parse: fn(&str) -> Result<T, String>,
    /// In help and completions, and to be suggested.
    names: Vec<&'static str>,
}

/// The parser of a type whose `FromStr` lists the known names in its error.
pub(crate) fn name<T>() -> NameParser<T>
where
    T: FromStr<Err: Display>,
{
    NameParser::new(|s| s.parse().map_err(|e: T::Err| e.to_string()))
}

/// The parser of wire layouts, and `auto`.
pub(crate) fn layout() -> NameParser<String> {
    NameParser::new(|s| match s {
        "auto" => Ok(s.into()),
        _ => pack::by_name(s)
            .map(|layout| layout.name().into())
            .map_err(|e| format!("{e}, auto")),
    })
}

/// The parser of `GLOB=PRECISION`.
pub(crate) fn rule() -> NameParser<Rule> {
    NameParser {
        parse: |s| s.parse().map_err(|e| format!("{e}")),
        names: name::<Target>().names,
    }
}

impl<T> NameParser<T> {
    /// The known names are those that the error of `parse` lists.
    pub(crate) fn new(parse: fn(&str) -> Result<T, String>) -> Self {
        let names = parse("?").err().map(|e| listed(&e)).unwrap_or_default();
        Self { parse, names }
    }

    /// The known name most similar to `value`, in clap's opinion; both without their numbers
    /// (`factor:0.7`) and without a glob (`*.weight=int8`).
    fn similar(&self, command: &Command, arg: Option<&Arg>, value: &str) -> Option<&'static str> {
        let value = value.rsplit('=').next().unwrap_or(value);
        let stem = |name: &'static str| name.split(':').next().unwrap_or(name);
        let stems = PossibleValuesParser::new(self.names.iter().map(|&name| stem(name)));
        let value = value.split(':').next().unwrap_or(value);
        let error = stems.parse_ref(command, arg, OsStr::new(value)).err()?;
        let Some(ContextValue::String(similar)) = error.get(ContextKind::SuggestedValue) else {
            return None;
        };
        let known = |name: &&&'static str| stem(name) == similar;
        self.names.iter().find(known).copied()
    }
}

/// The names that a message lists: "…, expected [one of] a, b or c[ with …][, got …]".
fn listed(message: &str) -> Vec<&'static str> {
    let Some((_, list)) = message.split_once("expected ") else {
        return vec![];
    };
    let list = list.strip_prefix("one of ").unwrap_or(list);
    let end = [", got ", " with "]
        .iter()
        .filter_map(|end| list.find(end))
        .min();
    list[..end.unwrap_or(list.len())]
        .split(", ")
        .flat_map(|part| part.split(" or "))
        // The definition of the command line lives as long as the program.
        .map(|name| &*Box::leak(name.trim_matches([' ', '`']).to_string().into_boxed_str()))
        .collect()
}

impl<T: Clone + Send + Sync + 'static> TypedValueParser for NameParser<T> {
    type Value = T;

    fn parse_ref(&self, command: &Command, arg: Option<&Arg>, value: &OsStr) -> Result<T, Error> {
        let text = value
            .to_str()
            .ok_or_else(|| Error::new(ErrorKind::InvalidUtf8).with_cmd(command))?;
        (self.parse)(text).map_err(|message| {
            let arg_name = arg.map(ToString::to_string).unwrap_or_default();
            let hint = self
                .similar(command, arg, text)
                .map(|name| format!("; did you mean '{name}'?"));
            let hint = hint.unwrap_or_default();
            let line = format!("invalid value '{text}' for '{arg_name}': {message}{hint}");
            Error::raw(ErrorKind::ValueValidation, line).with_cmd(command)
        })
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(self.names.iter().copied().map(PossibleValue::new)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitnet_checkpoint::recipe::Format;
    use bitnet_checkpoint::recipe::Preset;
    use bitnet_core::scheme::{BinarySplit, Clip, Mapping, Rounding, ScaleRule, Threshold};
    use bitnet_core::{Granularity, ScaleDtype};
    use bitnet_formats::hf::LinearClass;
    use bitnet_inference::{ActivationType, CacheType, FloatType};

    fn check<T>(parser: &NameParser<T>, count: usize) {
        assert!(parser.names.len() >= count, "{:?}", parser.names);
        for name in &parser.names {
            let value = name.replace(":X", ":1").replace(":N", ":1");
            assert!(
                (parser.parse)(&value).is_ok(),
                "{name} of {:?}",
                parser.names
            );
        }
    }

    /// The names come from the libraries' messages: each must be one.
    #[test]
    fn the_names_are_names() {
        check(&name::<Target>(), 10);
        check(&name::<Threshold>(), 6);
        check(&name::<ScaleRule>(), 2);
        check(&name::<BinarySplit>(), 3);
        check(&name::<Mapping>(), 2);
        check(&name::<Clip>(), 3);
        check(&name::<Granularity>(), 3);
        check(&name::<ScaleDtype>(), 3);
        check(&name::<Rounding>(), 3);
        check(&name::<Format>(), 3);
        check(&name::<LinearClass>(), 2);
        check(&name::<Preset>(), 6);
        check(&name::<ActivationType>(), 3);
        check(&name::<FloatType>(), 4);
        check(&name::<CacheType>(), 3);
        check(&layout(), 20);
        check(&super::super::model::shape(), 3);
        #[cfg(feature = "train")]
        {
            use bitnet_quant::qat::StraightThroughEstimator;
            check(&name::<StraightThroughEstimator>(), 5);
            check(&name::<bitnet_train::config::Network>(), 2);
            check(&super::super::train::activations(), 4);
        }
    }
}
