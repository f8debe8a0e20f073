use crate::cli::CheckArgs;
use crate::failure::Failure;
pub(crate) fn check(_args: &CheckArgs) -> Result<u8, Failure> {
    Ok(0)
}
