//! The parameters of models that many train: names and shapes, in the order in which their
//! implementations register them.
//!
//! Sources: ResNet-50: He et al., "Deep residual learning for image recognition", CVPR 2016, as
//! torchvision's `resnet50` has it. BERT large: Devlin et al., NAACL 2019, uncased, the encoder
//! with its pooler, as Hugging Face's `BertModel`. GPT-2 XL: Radford et al., "Language models are
//! unsupervised multitask learners", 2019, as Hugging Face's `GPT2LMHeadModel`, whose head is the
//! embedding. LLaMA 7B: Touvron et al., arXiv:2302.13971, as Hugging Face's `LlamaForCausalLM`.

use std::str::FromStr;

/// A model whose parameters are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Model {
    Resnet50,
    BertLarge,
    Gpt2Xl,
    Llama7b,
}

/// A parameter of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Parameter {
    pub(crate) name: String,
    /// The outermost dimension first.
    pub(crate) shape: Vec<usize>,
}

impl Model {
    pub(crate) const ALL: [Self; 4] =
        [Self::Resnet50, Self::BertLarge, Self::Gpt2Xl, Self::Llama7b];

    /// What it is called on the command line.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Resnet50 => "resnet50",
            Self::BertLarge => "bert-large",
            Self::Gpt2Xl => "gpt2-xl",
            Self::Llama7b => "llama-7b",
        }
    }

    /// Its parameters, in the order of registration.
    pub(crate) fn parameters(self) -> Vec<Parameter> {
        match self {
            Self::Resnet50 => resnet50(),
            Self::BertLarge => bert_large(),
            Self::Gpt2Xl => gpt2_xl(),
            Self::Llama7b => llama_7b(),
        }
    }
}

impl FromStr for Model {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|model| model.name().eq_ignore_ascii_case(name));
        found.ok_or_else(|| {
            let known = Self::ALL.map(Self::name).join(", ");
            format!("the shapes of {name} are not known: {known}")
        })
    }
}

impl Parameter {
    /// How many elements it has.
    pub(crate) fn count(&self) -> usize {
        self.shape.iter().product()
    }

    /// As it would be with about one in `scale` elements: outer dimensions shrink first.
    pub(crate) fn shrunk(mut self, scale: f64) -> Self {
        let mut left = scale;
        for size in &mut self.shape {
            let fewer = (*size as f64 / left).round().max(1.0);
            left *= fewer / *size as f64;
            *size = fewer as usize;
        }
        self
    }
}

/// Collects parameters.
#[derive(Default)]
struct Parameters(Vec<Parameter>);

impl Parameters {
    fn add(&mut self, name: String, shape: &[usize]) {
        self.0.push(Parameter { name, shape: shape.to_vec() });
    }

    /// A weight of the given shape and a bias.
    fn biased(&mut self, name: &str, shape: &[usize], bias: usize) {
        self.add(format!("{name}.weight"), shape);
        self.add(format!("{name}.bias"), &[bias]);
    }

    /// A linear layer: the weight has a row for each output.
    fn linear(&mut self, name: &str, inputs: usize, outputs: usize) {
        self.biased(name, &[outputs, inputs], outputs);
    }

    /// A layer or batch normalisation.
    fn norm(&mut self, name: &str, width: usize) {
        self.biased(name, &[width], width);
    }
}

fn resnet50() -> Vec<Parameter> {
    let mut all = Parameters::default();
    all.add("conv1.weight".into(), &[64, 3, 7, 7]);
    all.norm("bn1", 64);
    let mut inputs = 64;
    for (layer, (width, blocks)) in (1..).zip([(64, 3), (128, 4), (256, 6), (512, 3)]) {
        for block in 0..blocks {
            let name = format!("layer{layer}.{block}");
            bottleneck(&mut all, &name, inputs, width, block == 0);
            inputs = 4 * width;
        }
    }
    all.linear("fc", inputs, 1000);
    all.0
}

fn bottleneck(all: &mut Parameters, name: &str, inputs: usize, width: usize, has_shortcut: bool) {
    let convolutions = [(inputs, width, 1), (width, width, 3), (width, 4 * width, 1)];
    for (number, (inputs, outputs, size)) in (1..).zip(convolutions) {
        all.add(format!("{name}.conv{number}.weight"), &[outputs, inputs, size, size]);
        all.norm(&format!("{name}.bn{number}"), outputs);
    }
    if has_shortcut {
        all.add(format!("{name}.downsample.0.weight"), &[4 * width, inputs, 1, 1]);
        all.norm(&format!("{name}.downsample.1"), 4 * width);
    }
}

fn bert_large() -> Vec<Parameter> {
    const WIDTH: usize = 1024;
    let mut all = Parameters::default();
    let embeddings =
        [("word_embeddings", 30522), ("position_embeddings", 512), ("token_type_embeddings", 2)];
    for (name, rows) in embeddings {
        all.add(format!("embeddings.{name}.weight"), &[rows, WIDTH]);
    }
    all.norm("embeddings.LayerNorm", WIDTH);
    for layer in 0..24 {
        let name = format!("encoder.layer.{layer}");
        for part in ["self.query", "self.key", "self.value", "output.dense"] {
            all.linear(&format!("{name}.attention.{part}"), WIDTH, WIDTH);
        }
        all.norm(&format!("{name}.attention.output.LayerNorm"), WIDTH);
        all.linear(&format!("{name}.intermediate.dense"), WIDTH, 4 * WIDTH);
        all.linear(&format!("{name}.output.dense"), 4 * WIDTH, WIDTH);
        all.norm(&format!("{name}.output.LayerNorm"), WIDTH);
    }
    all.linear("pooler.dense", WIDTH, WIDTH);
    all.0
}

fn gpt2_xl() -> Vec<Parameter> {
    const WIDTH: usize = 1600;
    let mut all = Parameters::default();
    all.add("transformer.wte.weight".into(), &[50257, WIDTH]);
    all.add("transformer.wpe.weight".into(), &[1024, WIDTH]);
    for layer in 0..48 {
        let name = format!("transformer.h.{layer}");
        all.norm(&format!("{name}.ln_1"), WIDTH);
        // Weights of this model have a row for each input.
        let linear = |all: &mut Parameters, part: &str, inputs: usize, outputs: usize| {
            all.biased(&format!("{name}.{part}"), &[inputs, outputs], outputs);
        };
        linear(&mut all, "attn.c_attn", WIDTH, 3 * WIDTH);
        linear(&mut all, "attn.c_proj", WIDTH, WIDTH);
        all.norm(&format!("{name}.ln_2"), WIDTH);
        linear(&mut all, "mlp.c_fc", WIDTH, 4 * WIDTH);
        linear(&mut all, "mlp.c_proj", 4 * WIDTH, WIDTH);
    }
    all.norm("transformer.ln_f", WIDTH);
    all.0
}

fn llama_7b() -> Vec<Parameter> {
    const WIDTH: usize = 4096;
    const INNER: usize = 11008;
    const WORDS: usize = 32000;
    let mut all = Parameters::default();
    all.add("model.embed_tokens.weight".into(), &[WORDS, WIDTH]);
    for layer in 0..32 {
        let name = format!("model.layers.{layer}");
        for part in ["q_proj", "k_proj", "v_proj", "o_proj"] {
            all.add(format!("{name}.self_attn.{part}.weight"), &[WIDTH, WIDTH]);
        }
        all.add(format!("{name}.mlp.gate_proj.weight"), &[INNER, WIDTH]);
        all.add(format!("{name}.mlp.up_proj.weight"), &[INNER, WIDTH]);
        all.add(format!("{name}.mlp.down_proj.weight"), &[WIDTH, INNER]);
        all.add(format!("{name}.input_layernorm.weight"), &[WIDTH]);
        all.add(format!("{name}.post_attention_layernorm.weight"), &[WIDTH]);
    }
    all.add("model.norm.weight".into(), &[WIDTH]);
    all.add("lm_head.weight".into(), &[WORDS, WIDTH]);
    all.0
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// As the implementations count them.
    #[test]
    fn the_totals_are_the_published_ones() {
        let totals = Model::ALL.map(|model| {
            let parameters = model.parameters();
            (parameters.len(), parameters.iter().map(Parameter::count).sum::<usize>())
        });
        let published =
            [(161, 25_557_032), (391, 335_141_888), (580, 1_557_611_200), (291, 6_738_415_616)];
        assert_eq!(totals, published);
    }

    #[test]
    fn names_are_unique_and_no_parameter_is_empty() {
        for model in Model::ALL {
            let parameters = model.parameters();
            let names: BTreeSet<_> = parameters.iter().map(|parameter| &parameter.name).collect();
            assert_eq!(names.len(), parameters.len(), "{}", model.name());
            assert!(parameters.iter().all(|parameter| parameter.count() > 0));
        }
    }

    #[test]
    fn shrinking_keeps_ranks_and_proportions() {
        let shrunk = |shape: &[usize], scale| {
            Parameter { name: "weight".into(), shape: shape.to_vec() }.shrunk(scale).shape
        };
        assert_eq!(shrunk(&[64, 3, 7, 7], 1.0), [64, 3, 7, 7]);
        assert_eq!(shrunk(&[32000, 4096], 100.0), [320, 4096]);
        assert_eq!(shrunk(&[1, 1024], 4.0), [1, 256]);
        assert_eq!(shrunk(&[64], 1e9), [1]);
        let of = |scale| -> usize {
            Model::Llama7b.parameters().into_iter().map(|it| it.shrunk(scale).count()).sum()
        };
        let ratio = of(1.0) as f64 / of(1000.0) as f64;
        assert!((ratio / 1000.0 - 1.0).abs() < 0.03, "{ratio}");
    }

    #[test]
    fn layers_are_registered_in_the_order_of_their_implementations() {
        let at = |model: Model, range: std::ops::Range<usize>| -> Vec<String> {
            model.parameters()[range].iter().map(|p| format!("{} {:?}", p.name, p.shape)).collect()
        };
        assert_eq!(
            at(Model::Resnet50, 9..15),
            [
                "layer1.0.conv3.weight [256, 64, 1, 1]",
                "layer1.0.bn3.weight [256]",
                "layer1.0.bn3.bias [256]",
                "layer1.0.downsample.0.weight [256, 64, 1, 1]",
                "layer1.0.downsample.1.weight [256]",
                "layer1.0.downsample.1.bias [256]",
            ]
        );
        assert_eq!(
            at(Model::Gpt2Xl, 2..8),
            [
                "transformer.h.0.ln_1.weight [1600]",
                "transformer.h.0.ln_1.bias [1600]",
                "transformer.h.0.attn.c_attn.weight [1600, 4800]",
                "transformer.h.0.attn.c_attn.bias [4800]",
                "transformer.h.0.attn.c_proj.weight [1600, 1600]",
                "transformer.h.0.attn.c_proj.bias [1600]",
            ]
        );
        assert_eq!(at(Model::Llama7b, 290..291), ["lm_head.weight [32000, 4096]"]);
        assert_eq!(
            at(Model::BertLarge, 14..16),
            [
                "encoder.layer.0.attention.output.LayerNorm.bias [1024]",
                "encoder.layer.0.intermediate.dense.weight [4096, 1024]",
            ]
        );
    }

    #[test]
    fn names_are_read_and_others_refused_with_those_that_are_known() {
        for model in Model::ALL {
            assert_eq!(model.name().parse(), Ok(model));
        }
        assert!("vgg16".parse::<Model>().unwrap_err().contains("bert-large"));
    }
}
