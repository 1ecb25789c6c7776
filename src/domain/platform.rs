//! What platform a Graph type is for.

/// The platform that a derived type's name begins with. No prefix belongs to two platforms.
const PLATFORM_PREFIXES: &[(&str, &str)] = &[
    ("win", "windows"),
    ("officesuite", "windows"),
    ("microsoftstore", "windows"),
    ("editionupgrade", "windows"),
    ("sharedpc", "windows"),
    ("ios", "iOS"),
    ("ipad", "iOS"),
    ("managedios", "iOS"),
    ("depios", "iOS"),
    ("macos", "macOS"),
    ("depmacos", "macOS"),
    ("deptvos", "tvOS"),
    ("depvisionos", "visionOS"),
    ("android", "android"),
    ("managedandroid", "android"),
    ("aosp", "aosp"),
    ("apple", "apple"),
    ("depenrollment", "apple"),
];

/// The platform of a derived type, by its name.
pub(super) fn platform_of_type(odata_type: &str) -> Option<&'static str> {
    let name = odata_type.strip_prefix("#microsoft.graph.")?.to_ascii_lowercase();
    PLATFORM_PREFIXES.iter().find(|(prefix, _)| name.starts_with(prefix)).map(|(_, platform)| *platform)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platforms_follow_from_type_names() {
        for (name, platform) in [
            ("windows10GeneralConfiguration", Some("windows")),
            ("iosVppApp", Some("iOS")),
            ("managedAndroidStoreApp", Some("android")),
            ("macOSLobApp", Some("macOS")),
            ("webApp", None),
            ("aospDeviceOwnerCompliancePolicy", Some("aosp")),
            ("win32LobApp", Some("windows")),
        ] {
            assert_eq!(platform_of_type(&format!("#microsoft.graph.{name}")), platform, "{name}");
        }
    }
}
