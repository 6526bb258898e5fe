// Package sbom writes what a release is made of as an SPDX 2.3 document in JSON (spdx.github.io/spdx-spec/v2.3). The same
// release and the same time give the same bytes.
package sbom

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/internal/digest"
)

// A Release is what a document is about.
type Release struct {
	ID    digest.Digest
	Arch  string // Debian's word for it, of its packages
	Parts []Part
}

// A Part is an image of a release.
type Part struct {
	Name     string        // "base", "delta", "kernel", …; no two of a release have one
	Digest   digest.Digest // of its image
	Packages []string      // "name=version", sorted
}

// Of is the release with the parts that it has.
func Of(id digest.Digest, rel images.Release, base images.Base, delta images.Delta) Release {
	r := Release{ID: id, Arch: base.Arch}
	add := func(name string, d digest.Digest, packages []string) {
		if d != "" {
			r.Parts = append(r.Parts, Part{Name: name, Digest: d, Packages: packages})
		}
	}
	add("base", rel.Base.Digest, base.Packages)
	add("delta", rel.Delta.Digest, delta.Packages)
	add("kernel", rel.Kernel.Digest, nil)
	add("disk", rel.Disk.Digest, nil)
	return r
}

// Epoch is the time of a document: what SOURCE_DATE_EPOCH says (reproducible-builds.org/specs/source-date-epoch), given as
// env, else the first second of 2026, as of everything in an image.
func Epoch(env string) time.Time {
	if n, err := strconv.ParseInt(env, 10, 64); err == nil && n >= 0 {
		return time.Unix(n, 0).UTC()
	}
	return time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
}

// The parts of a document, named as the specification's JSON schema names them.
type document struct {
	SPDXVersion   string         `json:"spdxVersion"`
	DataLicense   string         `json:"dataLicense"`
	SPDXID        string         `json:"SPDXID"`
	Name          string         `json:"name"`
	Namespace     string         `json:"documentNamespace"`
	CreationInfo  creationInfo   `json:"creationInfo"`
	Describes     []string       `json:"documentDescribes"`
	Packages      []spdxPackage  `json:"packages"`
	Relationships []relationship `json:"relationships"`
}

type creationInfo struct {
	Created  string   `json:"created"`
	Creators []string `json:"creators"`
}

type spdxPackage struct {
	SPDXID           string        `json:"SPDXID"`
	Name             string        `json:"name"`
	VersionInfo      string        `json:"versionInfo,omitempty"`
	Supplier         string        `json:"supplier"`
	DownloadLocation string        `json:"downloadLocation"`
	FilesAnalyzed    bool          `json:"filesAnalyzed"`
	Checksums        []checksum    `json:"checksums,omitempty"`
	LicenseConcluded string        `json:"licenseConcluded"`
	LicenseDeclared  string        `json:"licenseDeclared"`
	CopyrightText    string        `json:"copyrightText"`
	ExternalRefs     []externalRef `json:"externalRefs,omitempty"`
	Purpose          string        `json:"primaryPackagePurpose,omitempty"`
}

type checksum struct {
	Algorithm string `json:"algorithm"`
	Value     string `json:"checksumValue"`
}

type externalRef struct {
	Category string `json:"referenceCategory"`
	Type     string `json:"referenceType"`
	Locator  string `json:"referenceLocator"`
}

type relationship struct {
	Element string `json:"spdxElementId"`
	Type    string `json:"relationshipType"`
	Related string `json:"relatedSpdxElement"`
}

const (
	// noAssertion is what is said of what nobody looked at (section 7.7 and others).
	noAssertion = "NOASSERTION"
	documentID  = "SPDXRef-DOCUMENT" // section 6.3
	releaseID   = "SPDXRef-release"
	contains    = "CONTAINS" // section 11.1
	// namespace begins the name of a document: it must be a URI of its own (section 6.5), and nothing need be there.
	namespace = "https://troupe.dev/spdx/release/"
)

// Document is the SPDX document of a release.
func (r Release) Document(created time.Time) ([]byte, error) {
	doc := document{
		SPDXVersion: "SPDX-2.3", DataLicense: "CC0-1.0", SPDXID: documentID, Name: "release " + r.ID.Short(), Namespace: namespace + r.ID.Hex(),
		CreationInfo: creationInfo{Created: created.UTC().Format("2006-01-02T15:04:05Z"), Creators: []string{"Tool: troupe"}},
		Describes:    []string{releaseID},
	}
	doc.Packages = []spdxPackage{plain(releaseID, "release", r.ID)}
	doc.Relationships = []relationship{{documentID, "DESCRIBES", releaseID}}
	for _, part := range r.Parts {
		id := "SPDXRef-" + idString(part.Name)
		doc.Packages = append(doc.Packages, plain(id, part.Name, part.Digest))
		doc.Relationships = append(doc.Relationships, relationship{releaseID, contains, id})
		for _, p := range slices.Sorted(slices.Values(part.Packages)) {
			name, version, ok := strings.Cut(p, "=")
			if !ok || name == "" || version == "" {
				return nil, fmt.Errorf("writing the SBOM of release %s: %q in the lock of its %s is no name=version", r.ID.Short(), p, part.Name)
			}
			deb := debian(id, name, version, r.Arch)
			doc.Packages = append(doc.Packages, deb)
			doc.Relationships = append(doc.Relationships, relationship{id, contains, deb.SPDXID})
		}
	}
	b, err := json.MarshalIndent(doc, "", " ")
	if err != nil {
		return nil, fmt.Errorf("writing the SBOM of release %s: %w", r.ID.Short(), err)
	}
	return append(b, '\n'), nil
}

// plain is a package of which only its digest is known.
func plain(id, name string, d digest.Digest) spdxPackage {
	return spdxPackage{
		SPDXID: id, Name: name, VersionInfo: d.Short(), Supplier: noAssertion, DownloadLocation: noAssertion,
		Checksums:        []checksum{{"SHA256", d.Hex()}},
		LicenseConcluded: noAssertion, LicenseDeclared: noAssertion, CopyrightText: noAssertion, Purpose: "OPERATING-SYSTEM",
	}
}

// debian is a Debian package of an image. Its purl is as purl-spec's types/deb-definition has it; the distribution is not in the
// lock, and "debian" stands for what is of its making.
func debian(part, name, version, arch string) spdxPackage {
	locator := "pkg:deb/debian/" + purlEscape(name) + "@" + purlEscape(version)
	if arch != "" {
		locator += "?arch=" + url.QueryEscape(arch)
	}
	return spdxPackage{
		SPDXID: part + "-deb-" + idString(name), Name: name, VersionInfo: version, Supplier: "Organization: Debian", DownloadLocation: noAssertion,
		LicenseConcluded: noAssertion, LicenseDeclared: noAssertion, CopyrightText: noAssertion,
		ExternalRefs: []externalRef{{"PACKAGE-MANAGER", "purl", locator}},
	}
}

// purlEscape percent-encodes what a purl's name and version must not have, but for the colon (purl-spec, "Character encoding").
func purlEscape(s string) string { return strings.ReplaceAll(url.QueryEscape(s), "%3A", ":") }

// idString has only what may be in an SPDXID: letters, digits, "." and "-" (section 7.2). Other characters become their code, so
// that two names have two ids.
func idString(s string) string {
	var b strings.Builder
	for _, c := range []byte(s) {
		if c == '.' || c == '-' || '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' && c != 'X' {
			b.WriteByte(c)
			continue
		}
		fmt.Fprintf(&b, "X%02x", c)
	}
	return cmp.Or(b.String(), "X")
}
