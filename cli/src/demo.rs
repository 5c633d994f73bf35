//! tmp
use crate::error::CliError;
/// Demo
#[derive(clap::Args, Debug, Default)]
pub struct DemoArgs {}
pub fn run(_: &DemoArgs) -> Result<(), CliError> {
    Ok(())
}
