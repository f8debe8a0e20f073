# The disk image: Debian as a raw ext4 file, its kernel, initial RAM disk and key beside it.
# shellcheck shell=bash disable=SC2154

# Hardware that the emulated machine lacks, and documents: two thirds of the size.
left_out=(
  '/usr/lib/modules/*/kernel/drivers/'{gpu,media,infiniband,iio,hwmon,usb,staging,isdn,ata,scsi,mtd,bluetooth,platform}'/*'
  '/usr/lib/modules/*/kernel/drivers/net/'{ethernet,wireless,can,usb}'/*'
  '/usr/lib/modules/*/kernel/sound/*'
  '/usr/share/'{doc,man,info,locale,icons}'/*'
  /etc/kernel/postinst.d/initramfs-tools
)

lab_image() {
  cached "lab/$release-$(hash_of "$here/recipe" "$here/lib/"{common,image}.sh)" build_lab_image
}

build_lab_image() {
  local dir=$1 packages
  need mmdebstrap mkfs.ext4 ssh-keygen unshare setpriv
  say "building the lab's image of Debian $release (about a minute)"
  packages=$(sed 's/#.*//' "$here/recipe/packages" | xargs | tr ' ' ,)
  debian_tree "$release" "$dir/root" "$packages" --variant=essential \
    "${left_out[@]/#/--dpkgopt=path-exclude=}" --customize-hook="$here/recipe/customize \"\$1\""
  mv "$dir"/root/boot/{vmlinuz,initrd,key} "$dir"
  truncate -s 16G "$dir/root.img"
  mkfs.ext4 -q -d "$dir/root" -L lab -O ^has_journal "$dir/root.img"
  rm -rf --one-file-system "$dir/root"
}
