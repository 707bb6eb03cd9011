fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().collect();
    lacuna::train::run(&lacuna::train::Options {
        out: args[1].clone().into(),
        seed: 1,
        steps: None,
        minutes: Some(args[2].parse()?),
        batch: args[3].parse()?,
        learning_rate: args[4].parse()?,
        hidden_size: 256,
        layers: 6,
        heads: 8,
        dtype: args[5].parse().map_err(anyhow::Error::msg)?,
        threads: 2,
    })
}
