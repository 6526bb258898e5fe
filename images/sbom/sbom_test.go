package sbom_test

import (
	"bytes"
	"encoding/json"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/troupe-dev/troupe/images/sbom"
	"github.com/troupe-dev/troupe/internal/digest"
)

func testRelease() sbom.Release {
	return sbom.Release{ID: digest.Of([]byte("release")), Arch: "amd64", Parts: []sbom.Part{
		{Name: "base", Digest: digest.Of([]byte("base")), Packages: []string{"libstdc++6=12.2.0-14", "zlib1g=1:1.2.13.dfsg-1", "libc6=2.36-9+deb12u10", "tzdata=2025b-0~deb12u1"}},
		{Name: "delta", Digest: digest.Of([]byte("delta")), Packages: []string{"zlib1g=1:1.2.13.dfsg-2"}},
		{Name: "app web", Digest: digest.Of([]byte("app"))},
	}}
}

func document(t *testing.T, r sbom.Release) ([]byte, map[string]any) {
	t.Helper()
	b, err := r.Document(sbom.Epoch(""))
	if err != nil {
		t.Fatal(err)
	}
	var doc map[string]any
	if err := json.Unmarshal(b, &doc); err != nil {
		t.Fatal(err)
	}
	return b, doc
}

// What SPDX 2.3 has as mandatory (annex "Required fields", and schemas/spdx-schema.json), with the form that it asks for.
var (
	ofDocument = map[string]string{ // sections 6.1 to 6.9
		"spdxVersion": `^SPDX-2\.3$`, "dataLicense": `^CC0-1\.0$`, "SPDXID": `^SPDXRef-DOCUMENT$`, "name": `.`, "documentNamespace": `^https://[^#]+$`,
	}
	ofPackage = map[string]string{ // sections 7.1 to 7.17
		"name": `.`, "SPDXID": `^SPDXRef-[a-zA-Z0-9.-]+$`, "downloadLocation": `^(NOASSERTION|NONE|\S+:\S+)$`,
		"supplier": `^(NOASSERTION|(Organization|Person): .+)$`, "licenseConcluded": `.`, "licenseDeclared": `.`, "copyrightText": `.`,
	}
	ofRelationship = map[string]string{"spdxElementId": `^SPDXRef-`, "relatedSpdxElement": `^SPDXRef-`, "relationshipType": `^(DESCRIBES|CONTAINS)$`}
)

func wantFields(t *testing.T, of any, want map[string]string) {
	t.Helper()
	m, ok := of.(map[string]any)
	if !ok {
		t.Fatalf("%v is no object", of)
	}
	for field, form := range want {
		s, ok := m[field].(string)
		if !ok || !regexp.MustCompile(form).MatchString(s) {
			t.Errorf("field %s is %v, want %s, in %v", field, m[field], form, m)
		}
	}
}

func TestRequiredFields(t *testing.T) {
	_, doc := document(t, testRelease())
	wantFields(t, doc, ofDocument)
	info, _ := doc["creationInfo"].(map[string]any)
	wantFields(t, info, map[string]string{"created": `^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$`})
	if creators, _ := info["creators"].([]any); len(creators) != 1 || creators[0] != "Tool: troupe" {
		t.Errorf("creators: %v", info["creators"])
	}
	ids := map[any]bool{"SPDXRef-DOCUMENT": true}
	packages, _ := doc["packages"].([]any)
	for _, p := range packages {
		wantFields(t, p, ofPackage)
		m, _ := p.(map[string]any)
		if m["filesAnalyzed"] != false { // else a verification code is mandatory (section 7.9)
			t.Errorf("files analysed: %v", m)
		}
		if ids[m["SPDXID"]] {
			t.Errorf("two elements are %v", m["SPDXID"])
		}
		ids[m["SPDXID"]] = true
	}
	if len(packages) != 1+3+5 {
		t.Errorf("%d packages", len(packages))
	}
	related := map[any]bool{}
	relationships, _ := doc["relationships"].([]any)
	for _, r := range relationships {
		wantFields(t, r, ofRelationship)
		m, _ := r.(map[string]any)
		if !ids[m["spdxElementId"]] || !ids[m["relatedSpdxElement"]] {
			t.Errorf("a relationship of what is not there: %v", m)
		}
		related[m["relatedSpdxElement"]] = true
	}
	if len(related) != len(packages) {
		t.Errorf("%d packages, %d of them in a relationship", len(packages), len(related))
	}
}

func TestPurls(t *testing.T) {
	b, _ := document(t, testRelease())
	for _, want := range []string{
		"pkg:deb/debian/libstdc%2B%2B6@12.2.0-14?arch=amd64", "pkg:deb/debian/zlib1g@1:1.2.13.dfsg-1?arch=amd64",
		"pkg:deb/debian/libc6@2.36-9%2Bdeb12u10?arch=amd64", "pkg:deb/debian/tzdata@2025b-0~deb12u1?arch=amd64",
	} {
		if !strings.Contains(string(b), `"`+want+`"`) {
			t.Errorf("no %s in\n%s", want, b)
		}
	}
}

func TestSameReleaseSameDocument(t *testing.T) {
	one, _ := document(t, testRelease())
	again, _ := document(t, testRelease())
	if !bytes.Equal(one, again) {
		t.Error("two documents of one release differ")
	}
	other := testRelease()
	other.ID = digest.Of([]byte("other"))
	if two, _ := document(t, other); bytes.Contains(two, []byte(testRelease().ID.Hex())) {
		t.Error("two releases have one namespace")
	}
}

func TestEpoch(t *testing.T) {
	for env, want := range map[string]time.Time{
		"1700000000": time.Date(2023, 11, 14, 22, 13, 20, 0, time.UTC), "": time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC),
		"yesterday": time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC),
	} {
		if got := sbom.Epoch(env); !got.Equal(want) {
			t.Errorf("SOURCE_DATE_EPOCH=%s is %s, want %s", env, got, want)
		}
	}
}

func TestLockThatIsNone(t *testing.T) {
	r := testRelease()
	r.Parts[0].Packages = []string{"libc6"}
	if _, err := r.Document(sbom.Epoch("")); err == nil {
		t.Error("a package without a version was taken")
	}
}
