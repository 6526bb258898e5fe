package schema

import "encoding/json"

// Compile says how an image is made of a source, in a machine that is there for nothing else.
type Compile struct {
	Source CompileSource `json:"source"`
	In     string        `json:"in"` // names an Image of kind "os": that of the machine
	// Base is what that image is made of. No file says it: it is found when the fleet is loaded.
	Base    *Debian  `json:"base,omitempty"`
	Run     []string `json:"run"`    // shell commands, run in order in /src
	Output  string   `json:"output"` // absolute path of the directory or file that the image gets
	Network bool     `json:"network,omitempty"`
}

// CompileSource is a directory of the repo, or an archive. In CUE a plain string is the directory.
type CompileSource struct {
	Dir    string `json:"dir,omitempty"`  // from the directory of the fleet
	Tree   string `json:"tree,omitempty"` // names what the directory holds: internal/treesum
	URL    string `json:"url,omitempty"`  // http, https or file
	SHA256 string `json:"sha256,omitempty"`
}

// UnmarshalJSON reads a string as a directory.
func (s *CompileSource) UnmarshalJSON(b []byte) error {
	if len(b) > 0 && b[0] == '"' {
		*s = CompileSource{}
		return json.Unmarshal(b, &s.Dir)
	}
	type plain CompileSource
	return json.Unmarshal(b, (*plain)(s))
}
