# Writes a directory tree as an OCI image layout; the same tree gives the same digests.
# shellcheck shell=bash disable=SC2154

# Whatever is younger than this is given this age.
export SOURCE_DATE_EPOCH=1735689600

# write_layout LAYOUT TREE REFERENCE CMD PATH
write_layout() {
  local layout=$1 tree=$2 reference=$3 cmd=$4 path=$5 created diff_id layer config manifest
  created=$(date --utc --date="@$SOURCE_DATE_EPOCH" +%FT%TZ)
  mkdir -p "$layout/blobs/sha256"
  tar --sort=name --numeric-owner --xattrs --clamp-mtime --mtime="@$SOURCE_DATE_EPOCH" \
    --format=pax --pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime \
    --exclude='./'{dev,proc,run,sys,tmp}'/*' -C "$tree" -cf "$layout/layer.tar" .
  diff_id=$(sha256sum <"$layout/layer.tar" | cut -d' ' -f1)
  layer=$(gzip --no-name --stdout "$layout/layer.tar" | blob "$layout" application/vnd.oci.image.layer.v1.tar+gzip)
  rm "$layout/layer.tar"
  config=$(blob "$layout" application/vnd.oci.image.config.v1+json <<JSON
{"created":"$created","architecture":"amd64","os":"linux","config":{"Env":["PATH=$path"],"Cmd":["$cmd"]},"rootfs":{"type":"layers","diff_ids":["sha256:$diff_id"]},"history":[{"created":"$created","created_by":"tests/images"}]}
JSON
  )
  manifest=$(blob "$layout" application/vnd.oci.image.manifest.v1+json \
    ",\"platform\":{\"architecture\":\"amd64\",\"os\":\"linux\"},\"annotations\":{\"org.opencontainers.image.ref.name\":\"$reference\"}" <<JSON
{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":$config,"layers":[$layer]}
JSON
  )
  echo "{\"schemaVersion\":2,\"mediaType\":\"application/vnd.oci.image.index.v1+json\",\"manifests\":[$manifest]}" >"$layout/index.json"
  echo '{"imageLayoutVersion":"1.0.0"}' >"$layout/oci-layout"
  chmod 755 "$layout"
}

# write_debian_layout LAYOUT TREE REFERENCE: the same of a tree that mmdebstrap has made, which it removes.
write_debian_layout() {
  local layout=$1 tree=$2 reference=$3
  # The mirror that this machine uses is nobody else's business; the rest differs from build to build.
  rm -rf "$tree"/etc/apt/sources.list{,.d/*} "$tree"/var/log/* "$tree"/var/cache/{apt,debconf,ldconfig}/* \
    "$tree"/etc/{resolv.conf,hostname}
  write_layout "$layout" "$tree" "$reference" bash /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
  rm -rf --one-file-system "$tree"
}

# blob LAYOUT MEDIA_TYPE [MORE]: stores standard input, prints its descriptor.
blob() {
  local layout=$1 type=$2 more=${3:-} file digest
  file=$(mktemp "$layout/blobs/sha256/.new.XXXXXX")
  cat >"$file"
  digest=$(sha256sum <"$file" | cut -d' ' -f1)
  chmod 644 "$file"
  mv "$file" "$layout/blobs/sha256/$digest"
  echo "{\"mediaType\":\"$type\",\"digest\":\"sha256:$digest\",\"size\":$(stat -c %s "$layout/blobs/sha256/$digest")$more}"
}
