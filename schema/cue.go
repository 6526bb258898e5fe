package schema

import _ "embed"

// CUE is the schema in CUE, a file of "package schema" whose #Fleet is what a repo must be. It is the reference of
// every field that a repo may use.
//
//go:embed fleet.cue
var CUE string
